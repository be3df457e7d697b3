"""A tokenizer with more tokens than the model has logits, and one with fewer: grammars are followed
and no mask lets through an id that is not there.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from llguidance import LLMatcher
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from lockstep.engine.text.vocabulary import load_vocabulary
from support.engine.text.tiny_tokenizer import IM_END, tiny_tokenizer, write_model
from support.engine.text.tokenizer_kinds import KINDS, tokenizer_of, write_kind

SIZE = tiny_tokenizer().get_vocab_size()
GRAMMARS = {
    "literal": 'start: "a <|extra_0|> b<|extra_1|>"',
    "regex": "start: /[a-z ]{3}<\\|extra_[01]\\|>/",
    "json": 'start: %json {"const": "<|extra_0|>"}',
}


def with_extra_tokens(path: Path) -> Path:
    write_model(path)
    file = path / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    for number in range(2):
        added = {**tokenizer["added_tokens"][0], "content": f"<|extra_{number}|>"}
        tokenizer["added_tokens"].append({**added, "id": SIZE + number, "special": number == 0})
    file.write_text(json.dumps(tokenizer))
    return path


def walk(path: Path, vocab_size: int, grammar: str, seed: int) -> str:
    """A text that the masks allow, drawn token by token."""
    vocabulary = load_vocabulary(path, vocab_size, (IM_END,))
    assert vocabulary is not None and vocabulary.vocab_size == vocab_size
    matcher, draw, tokens = LLMatcher(vocabulary, grammar), np.random.default_rng(seed), []
    while not matcher.is_stopped():
        bits = allocate_token_bitmask(1, vocab_size)
        fill_next_token_bitmask(matcher, bits, 0)
        allowed = np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little"))
        assert len(allowed) and allowed.max() < vocab_size, matcher.get_error()
        token = int(draw.choice(allowed))
        assert matcher.consume_token(token), matcher.get_error()
        tokens += [] if token == IM_END else [token]
        assert len(tokens) < 200
    assert not matcher.is_error(), matcher.get_error()
    return tiny_tokenizer().decode(tokens, skip_special_tokens=False)


@pytest.mark.parametrize("grammar", GRAMMARS)
@pytest.mark.parametrize("vocab_size", [SIZE, SIZE + 1, SIZE + 2, SIZE + 77])
def test_walks_end_as_the_grammar_says(tmp_path: Path, grammar: str, vocab_size: int) -> None:
    path = with_extra_tokens(tmp_path) if vocab_size == SIZE else write_model(tmp_path)
    texts = {walk(path, vocab_size, GRAMMARS[grammar], seed) for seed in range(5)}
    for text in texts:
        if grammar == "regex":
            assert text[3:] in ("<|extra_0|>", "<|extra_1|>")
        else:
            assert text == {"literal": "a <|extra_0|> b<|extra_1|>", "json": '"<|extra_0|>"'}[grammar]


@pytest.mark.parametrize("kind", ["byte_level", "llama2", "gemma"])
@pytest.mark.parametrize("cut", [1, 2, 40])
def test_any_tokenizer_can_be_cut(tmp_path: Path, kind: str, cut: int) -> None:
    assert kind in KINDS
    size = tokenizer_of(kind).get_vocab_size() - cut
    vocabulary = load_vocabulary(write_kind(tmp_path, kind), size, (2,))
    assert vocabulary is not None and vocabulary.vocab_size == size
