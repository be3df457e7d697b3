"""Tokens of every kind of tokenizer: their bytes join to the text, their places slice it."""

from __future__ import annotations

from functools import cache

import msgspec
import pytest
from hypothesis import given, strategies as st

from lockstep.engine.frontend.requests.logprobs import chat_logprobs, text_logprobs
from lockstep.engine.frontend.requests.places import Places
from lockstep.engine.text.tokenizer import Codec
from support.engine.text.tokenizer_kinds import JOINING, KINDS, SPACE, tokenizer_of, write_kind

numbers = st.lists(st.integers(0, 10**6), max_size=24)


@pytest.fixture(scope="module")
def codecs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Codec]:
    folder = tmp_path_factory.mktemp("kinds")
    return {kind: Codec(write_kind(folder / kind, kind)) for kind in KINDS}


@cache
def ids_by_name(kind: str) -> dict[str, int]:
    return dict(tokenizer_of(kind).get_vocab())


def drawn(kind: str, values: list[int], spare: int = 2) -> list[int]:
    """Ids of a tokenizer, and a few that it does not have."""
    size = tokenizer_of(kind).get_vocab_size() + spare
    return [value % size for value in values]


@pytest.mark.parametrize("kind", JOINING)
@given(values=numbers, skip=st.booleans())
def test_bytes_join_to_the_text_and_places_slice_it(
    codecs: dict[str, Codec], kind: str, values: list[int], skip: bool
) -> None:
    codec, ids = codecs[kind], drawn(kind, values)
    detokenizer = codec.detokenizer(skip, [])
    text = "".join(map(detokenizer.push, ids)) + detokenizer.finish()
    assert text == codec.text(ids, skip)
    places = Places(codec, skip, [])
    pieces, offsets = [], []
    for token in ids:
        pieces.append(codec.piece(token, places.opening) if codec.is_shown(token, skip) else b"")
        offsets.append(places.take(token))
    assert b"".join(pieces).decode("utf-8", "replace") == text
    assert offsets == sorted(offsets)
    for at, (piece, offset) in enumerate(zip(pieces, offsets, strict=True)):
        if "\ufffd" not in piece.decode("utf-8", "replace") and "\ufffd" not in text:
            assert text[offset:].startswith(piece.decode()), f"token {at}"


@pytest.mark.parametrize("kind", JOINING)
@given(values=numbers, skip=st.booleans())
def test_the_text_is_that_of_the_tokenizer(
    codecs: dict[str, Codec], kind: str, values: list[int], skip: bool
) -> None:
    ids = drawn(kind, values, spare=0)
    text = tokenizer_of(kind).decode(ids, skip_special_tokens=skip)
    if "\ufffd" not in text:  # else the tokenizer gives up on whole characters beside a broken one
        assert codecs[kind].text(ids, skip) == text


@pytest.mark.parametrize("kind", JOINING)
@given(before=numbers.filter(bool), after=numbers, skip=st.booleans())
def test_a_text_goes_on_behind_its_prompt(
    codecs: dict[str, Codec], kind: str, before: list[int], after: list[int], skip: bool
) -> None:
    codec, prompt, output = codecs[kind], drawn(kind, before), drawn(kind, after)
    detokenizer = codec.detokenizer(skip, prompt)
    text = "".join(map(detokenizer.push, output)) + detokenizer.finish()
    whole = codec.text(prompt + output, skip)
    if "\ufffd" not in whole + codec.text(prompt, skip):
        assert codec.text(prompt, skip) + text == whole


@pytest.mark.parametrize("kind", ["llama2", "gemma", "no_bytes", "metaspace"])
def test_a_token_keeps_its_space(codecs: dict[str, Codec], kind: str) -> None:
    names, codec = ids_by_name(kind), codecs[kind]
    ids = [names[name] for name in ("<s>", SPACE + "hel", "lo", SPACE + "w", "or", "ld")]
    for skip in (True, False):
        places, text = Places(codec, skip, []), codec.text(ids, skip)
        shown = text_logprobs(codec, ids, [None] * len(ids), 0, places)
        opening = " hel" if kind == "gemma" or not skip else "hel"
        assert shown["tokens"] == ["<s>", opening, "lo", " w", "or", "ld"]
        begin = 0 if skip else 3
        assert text[begin:] == "".join(shown["tokens"][1:])
        lengths = [0, begin, *(begin + len("".join(shown["tokens"][1:end])) for end in range(2, 6))]
        assert shown["text_offset"] == lengths
    assert codec.piece(names[SPACE + "w"]) == b" w"


def test_parts_of_a_character_have_their_own_bytes(codecs: dict[str, Codec]) -> None:
    names, codec = ids_by_name("llama2"), codecs["llama2"]
    ids = [names[f"<0x{byte:02X}>"] for byte in "🙂".encode()]
    shown = chat_logprobs(codec, ids, [None] * 4, 0)["content"]
    assert bytes(byte for token in shown for byte in token["bytes"]).decode() == "🙂"
    assert {token["token"] for token in shown} == {"\ufffd"}
    places = Places(codec, True, [])
    whole = [names["a"], *ids, names["b"]]
    assert [places.take(token) for token in whole] == [0, 1, 1, 1, 1, 2]
    assert codec.text(whole, True) == "a🙂b"
    assert codec.text([*ids, ids[0]], True) == "🙂\ufffd"


def test_the_space_of_a_byte_token_is_dropped_as_any_other(codecs: dict[str, Codec]) -> None:
    names, codec = ids_by_name("llama2"), codecs["llama2"]
    space, a = names["<0x20>"], names["a"]
    assert codec.text([space, a, space], True) == tokenizer_of("llama2").decode([space, a, space]) == "a "
    assert (codec.piece(space), codec.piece(space, opening=True)) == (b" ", b"")


def test_tokens_whose_neighbours_decide_are_decoded_together(codecs: dict[str, Codec]) -> None:
    names, codec = ids_by_name("word_ends"), codecs["word_ends"]
    ids = [names[name] for name in ("hel", "lo</w>", "w", "or", "ld</w>")]
    detokenizer = codec.detokenizer(True, [])
    assert "".join(map(detokenizer.push, ids)) + detokenizer.finish() == "hello world"
    assert [codec.piece(token) for token in ids] == [b"hel", b"lo ", b"w", b"or", b"ld "]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_beyond_the_tokenizer_have_no_text(codecs: dict[str, Codec], kind: str) -> None:
    codec, beyond = codecs[kind], tokenizer_of(kind).get_vocab_size() + 5
    assert codec.piece(beyond) == codec.piece(beyond, opening=True) == b""
    assert codec.detokenizer(True, []).push(beyond) == ""


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizer_info_can_be_sent_and_names_no_path(
    codecs: dict[str, Codec], kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    sent = msgspec.json.encode(codecs[kind].describe()).decode()
    assert str(tmp_path_factory.getbasetemp()) not in sent
    assert '"eos_token":null' in sent and '"model_max_length":1e30' in sent
