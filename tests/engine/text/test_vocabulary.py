"""The vocabulary of matchers: which tokens are text, and how text that leaves no choice is cut."""

from __future__ import annotations

from pathlib import Path

import pytest
from llguidance import LLMatcher

from lockstep.engine.text.tokenizer import Codec
from lockstep.engine.text.vocabulary import load_vocabulary
from support.engine.text.tagged_tokenizer import END, HIDDEN, STORAGES, write_tagged

TAGS = ("<think>", "[ARGS]")


@pytest.mark.parametrize("storage", STORAGES)
def test_only_hidden_and_ending_tokens_are_no_text(tmp_path: Path, storage: str) -> None:
    size, end = write_tagged(tmp_path, TAGS, storage)
    vocabulary, codec = load_vocabulary(tmp_path, size, (end,)), Codec(tmp_path)
    assert vocabulary is not None
    for name in (END, HIDDEN):
        assert vocabulary.is_special_token(codec.added_id(name))  # type: ignore[arg-type]
    for tag in TAGS:
        id = codec.added_id(tag)
        if id is not None:
            assert vocabulary.is_special_token(id) == storage.endswith("special")
            assert storage.endswith("special") or vocabulary.decode_bytes([id]) == tag.encode()


@pytest.mark.parametrize("storage", STORAGES)
def test_forced_text_is_cut_into_tokens_that_are_text(tmp_path: Path, storage: str) -> None:
    size, end = write_tagged(tmp_path, TAGS, storage)
    vocabulary = load_vocabulary(tmp_path, size, (end,))
    assert vocabulary is not None
    for text in (f"a<think>{END}b", f"<{END}>", END * 2, "[ARGS]{", " a  b", "ü<thi"):
        ids = vocabulary.tokenize_str(text)
        assert not any(vocabulary.is_special_token(id) for id in ids)
        assert vocabulary.decode_bytes(ids) == text.encode()


def test_tokens_beyond_the_logits_are_spelled_from_pieces(tmp_path: Path) -> None:
    size, end = write_tagged(tmp_path, TAGS, "added")
    assert Codec(tmp_path).added_id("[ARGS]") == size - 1
    vocabulary = load_vocabulary(tmp_path, size - 1, (end,))
    assert vocabulary is not None
    matcher = LLMatcher(vocabulary, 'start: "<think>[ARGS]"', log_level=0)
    tokens = vocabulary.tokenize_str("<think>[ARGS]")
    assert len(tokens) > 2
    assert max(tokens) < size - 1
    assert matcher.consume_tokens(tokens)
    assert matcher.is_accepting()
