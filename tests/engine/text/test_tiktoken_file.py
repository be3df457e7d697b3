"""Kimi-K2's tokenizer file against the ``tiktoken`` library: the same ids and the same text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import given, strategies as st

from lockstep.engine.frontend.requests.chat_template import render
from lockstep.engine.text.tokenizer import Codec
from support.engine.text.tiktoken_folder import CORPUS, FIRST, SPECIAL, reference_encoding, write_tokenizer

UNNAMED = f"<|reserved_token_{FIRST + 99}|>"
TEXTS = (
    *(CORPUS[i : i + 40] for i in range(0, len(CORPUS), 40)),
    "中文English混合内容",
    "iPhone's and IPHONE'S, it'LL",
    "zqx zqxz",
    "1234567890 ٣٤٥ Ⅷ½",
    "   leading\n\n \n trailing   ",
    "a  b   c\u3000d\u00a0e\u200be",
    "𠀀𠮷野家 〇々 ǅ ʰ ́e",
    "<|im_user|>user<|im_middle|>hi<|im_end|>[BOS]<|tool|>" + UNNAMED,
)


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Codec:
    return Codec(write_tokenizer(tmp_path_factory.mktemp("kimi")))


@pytest.fixture(scope="module")
def reference() -> tiktoken.Encoding:
    return reference_encoding()


def both_ways(codec: Codec, reference: tiktoken.Encoding, text: str) -> None:
    ids = codec.encode(text, add_special_tokens=True)
    assert ids == reference.encode(text, allowed_special="all")
    assert codec.decode(ids, skip_special_tokens=False) == text == reference.decode(ids)
    detokenizer = codec.detokenizer(False, [])
    assert "".join(map(detokenizer.push, ids)) + detokenizer.finish() == text
    assert b"".join(map(codec.piece, ids)) == text.encode()


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_are_those_of_tiktoken(codec: Codec, reference: tiktoken.Encoding, text: str) -> None:
    both_ways(codec, reference, text)


@given(st.text(st.sampled_from("aabnsTü中文 \n'S1🙂.<|"), max_size=60))
def test_any_mixture(codec: Codec, reference: tiktoken.Encoding, text: str) -> None:
    both_ways(codec, reference, text)


@given(st.binary(max_size=24))
def test_broken_characters_are_shown_as_tiktoken_shows_them(
    codec: Codec, reference: tiktoken.Encoding, data: bytes
) -> None:
    assert codec.decode(list(data), skip_special_tokens=False) == reference.decode(list(data))


def test_special_tokens(codec: Codec) -> None:
    assert codec.eos_id == SPECIAL["<|im_end|>"]
    ids = codec.encode("<|im_user|>the<|tool|>" + UNNAMED, add_special_tokens=False)
    assert codec.decode(ids, skip_special_tokens=True) == "the<|tool|>", (
        "<|tool|> is not special in tokenizer_config.json"
    )
    assert max(SPECIAL.values()) == FIRST + 255 and codec.ids_of(SPECIAL) == frozenset(SPECIAL.values())


def test_the_template_comes_from_either_file(codec: Codec, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    assert render(codec, messages, None) == "[BOS]<|im_user|>hi<|im_end|>"
    folder = write_tokenizer(tmp_path / "m", chat_template=None)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    assert render(Codec(folder), messages, None) == "hi!"


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "code": (
        {"auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}},
        "auto_map.AutoTokenizer is 'tokenization_qwen",
    ),
    "no code": ({"auto_map": {}}, "auto_map.AutoTokenizer is None"),
    "outside": (
        {"added_tokens_decoder": {"9": {"content": "x"}}},
        f"names token 9; expected {FIRST} to {FIRST + 255}",
    ),
    "unknown": ({"eos_token": "<|nothing|>"}, r"eos_token is '<\|nothing\|>', which is no token"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_file(case: str, tmp_path: Path) -> None:
    changes, message = ERRORS[case]
    with pytest.raises(ValueError, match=rf"the tokenizer of .*tokenizer_config\.json: .*{message}"):
        Codec(write_tokenizer(tmp_path / "m", **changes))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"!!! 5\n", f"line {FIRST + 1} is not a token"),
        (b"YQ==\n", f"line {FIRST + 1}"),
        (b"enp6 999\n", "without gaps"),
    ],
)
def test_a_broken_rank_file_is_refused(line: bytes, message: str, tmp_path: Path) -> None:
    file = write_tokenizer(tmp_path / "m") / "tiktoken.model"
    file.write_bytes(file.read_bytes() + line)
    with pytest.raises(ValueError, match=rf"tiktoken\.model: .*{message}"):
        Codec(tmp_path / "m")
