"""Mistral's tokenizer file against the ``tiktoken`` library: the same ids and the same text."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, strategies as st

from lockstep.engine.frontend.requests.chat_template import render
from lockstep.engine.text.tokenizer import Codec
from lockstep.engine.text.vocabulary import load_vocabulary
from support.engine.text.tekken_folder import NUM_SPECIAL, SPECIAL, reference_encoding, write_tekken
from support.engine.text.tiktoken_folder import CORPUS, RANKS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tekken(tmp_path_factory.mktemp("mistral"))


@pytest.fixture(scope="module")
def codec(folder: Path) -> Codec:
    return Codec(folder)


@pytest.fixture(scope="module")
def reference() -> tiktoken.Encoding:
    return reference_encoding()


def both_ways(codec: Codec, reference: tiktoken.Encoding, text: str) -> None:
    ids = codec.encode(text, add_special_tokens=False)
    assert ids == reference.encode(text, allowed_special="all")
    assert codec.encode(text, add_special_tokens=True) == [SPECIAL["<s>"], *ids]
    assert codec.decode(ids, skip_special_tokens=False) == text == reference.decode(ids)
    detokenizer = codec.detokenizer(False, [])
    assert "".join(map(detokenizer.push, ids)) + detokenizer.finish() == text


@pytest.mark.parametrize(
    "text", [CORPUS, "beyond zqx", "[INST]hi[/INST][TOOL_CALLS]now[ARGS]{}</s><SPECIAL_7>"]
)
def test_ids_and_text_are_those_of_tiktoken(codec: Codec, reference: tiktoken.Encoding, text: str) -> None:
    both_ways(codec, reference, text)


@given(st.text(st.sampled_from("aabnsTü中文 \n'S1🙂.[<"), max_size=60))
def test_any_mixture(codec: Codec, reference: tiktoken.Encoding, text: str) -> None:
    both_ways(codec, reference, text)


def test_special_tokens_and_the_template(codec: Codec, folder: Path) -> None:
    assert (codec.eos_id, codec.special_ids) == (SPECIAL["</s>"], frozenset(range(NUM_SPECIAL)))
    assert render(codec, [{"role": "user", "content": "hi"}], None) == "<s>[INST]hi[/INST]"
    matchers = load_vocabulary(folder, len(RANKS) + NUM_SPECIAL, (2,))
    assert matchers is not None and matchers.decode_bytes([NUM_SPECIAL + 65]) == b"A"


def test_another_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tekken\.json: not readable as Mistral's tokenizer: KeyError"):
        Codec(write_tekken(tmp_path, config={}))
