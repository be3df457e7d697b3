from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from lockstep.engine.text.detokenizer import WindowDetokenizer
from lockstep.engine.text.tokenizer import Codec
from support.engine.text.tiny_tokenizer import (
    IM_END,
    IM_START,
    SENTENCES,
    VOCAB_SIZE,
    tiny_tokenizer,
    write_model,
)

UNKNOWN = frozenset({0})  # the one special id of the tokenizer below


@cache
def metaspace_tokenizer() -> Tokenizer:
    """A tokenizer in the manner of Llama 2: spaces as U+2581, unknown characters as byte tokens."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(["the quick brown fox jumps"] * 4, trainer)
    tokenizer.add_tokens(special[1:])
    return tokenizer


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Codec:
    return Codec(write_model(tmp_path_factory.mktemp("model")))


ids = st.lists(st.integers(0, VOCAB_SIZE + 5), max_size=40)


@given(ids=ids, skip=st.booleans())
def test_joined_pieces_equal_the_decoding_of_all_tokens(codec: Codec, ids: list[int], skip: bool) -> None:
    detokenizer = codec.detokenizer(skip, [])
    joined = "".join([detokenizer.push(token) for token in ids]) + detokenizer.finish()
    known = [token for token in ids if codec.token_name(token)]
    assert joined == tiny_tokenizer().decode(known, skip_special_tokens=skip)


@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
def test_text_survives_the_round_trip_without_a_broken_character(codec: Codec, text: str) -> None:
    detokenizer = codec.detokenizer(True, [])
    pieces = [detokenizer.push(token) for token in codec.encode(text, False)]
    assert all("\ufffd" not in piece or "\ufffd" in text for piece in pieces)
    assert "".join(pieces) + detokenizer.finish() == text


def test_an_incomplete_character_at_the_end_is_one_replacement_character(codec: Codec) -> None:
    tokenizer: Any = tiny_tokenizer()
    first = tokenizer.token_to_id(tokenizer.pre_tokenizer.pre_tokenize_str("€")[0][0][0])
    detokenizer = codec.detokenizer(True, [])
    assert detokenizer.push(first) == ""
    assert detokenizer.finish() == "\ufffd"


@pytest.mark.parametrize("text", ["the quick fox", "naïve 東京 🙂 end", "\ufffd\ufffd the"])
def test_window_detokenizer_gives_every_token_once_and_whole(text: str) -> None:
    tokenizer = metaspace_tokenizer()
    ids = tokenizer.encode(text).ids
    detokenizer = WindowDetokenizer(tokenizer.decode, UNKNOWN, [])
    pieces = [detokenizer.push(token) for token in ids]
    assert "".join(pieces) + detokenizer.finish() == tokenizer.decode(ids)
    if "\ufffd" not in tokenizer.decode(ids):
        assert all("\ufffd" not in piece for piece in pieces)


def test_window_detokenizer_keeps_the_space_after_the_prompt() -> None:
    tokenizer = metaspace_tokenizer()
    prompt, output = tokenizer.encode("the quick").ids, tokenizer.encode(" brown fox").ids
    detokenizer = WindowDetokenizer(tokenizer.decode, UNKNOWN, prompt[-6:])
    assert "".join(map(detokenizer.push, output)) + detokenizer.finish() == " brown fox"


def test_special_tokens_are_hidden_unless_asked_for(codec: Codec) -> None:
    assert codec.detokenizer(True, []).push(IM_END) == ""
    assert codec.detokenizer(False, []).push(IM_END) == "<|im_end|>"
    shown = codec.ids_of(["<|im_end|>", "no token"])
    assert shown == {IM_END}
    assert codec.detokenizer(True, [], shown).push(IM_END) == "<|im_end|>"
    assert codec.detokenizer(True, [], shown).push(IM_START) == ""


def test_window_detokenizer_hides_and_shows() -> None:
    tokenizer = metaspace_tokenizer()
    quick, brown = tokenizer.encode("quick").ids, tokenizer.encode(" brown").ids
    for hidden, text in ((UNKNOWN, "quick brown"), (frozenset[int](), "quick<unk> brown")):
        detokenizer = WindowDetokenizer(tokenizer.decode, hidden, [0])
        joined = "".join(map(detokenizer.push, [*quick, 0, *brown])) + detokenizer.finish()
        assert joined.strip() == text


def test_a_directory_without_a_tokenizer_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"model\.path: .* tokenizer\.json, tiktoken\.model or tekken\.json should be there"
    ):
        Codec(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"model\.path: the tokenizer of .* cannot be loaded"):
        Codec(tmp_path)


def test_every_sentence_is_encoded_as_by_the_tokenizer_itself(codec: Codec) -> None:
    for sentence in SENTENCES:
        assert codec.encode(sentence, False) == tiny_tokenizer().encode(sentence).ids
