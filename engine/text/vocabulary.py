"""The vocabulary of a checkpoint as matchers see it: the bytes of every token.

A matcher keeps special tokens out of text: a grammar can only name them by id. Here these are the
tokens that the tokenizer marks as special, because clients do not see them, and those that end a
text. Every other token is the text that it stands for, also an added one such as ``<think>``, which
llguidance takes for special whatever the tokenizer says. A literal in a grammar may then be written
with that token or with smaller pieces, and a grammar may name the token by id as well.
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
from llguidance import LLTokenizer

from .byte_tokenizer import build_tokenizer, is_described_alone


class _Added(msgspec.Struct):
    id: int
    content: str
    special: bool = False


class _TokenizerFile(msgspec.Struct):
    added_tokens: list[_Added] = []


class Vocabulary:
    """A tokenizer in the shape that llguidance takes, made of the ``text`` of a tokenizer.json.
    ``vocab_size`` is the width of the logits. llguidance calls it for the tokens of text that a
    grammar leaves no choice about.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, text: str, vocab_size: int, eos_ids: tuple[int, ...]) -> None:
        self._tokenizer = LLTokenizer(text, slices=[])
        added = msgspec.json.decode(text, type=_TokenizerFile).added_tokens
        ends = set(eos_ids) or {self._tokenizer.eos_token}
        hidden = {token.id for token in added if token.special} | ends
        shown = {token.id: token.content.encode() for token in added if token.id not in hidden}
        num_tokens = min(self._tokenizer.vocab_size, vocab_size)
        self.eos_token_id = min(ends)
        self.tokens = [
            shown[id] if id in shown else self._tokenizer.decode_bytes([id]) for id in range(num_tokens)
        ]
        self.tokens += [b""] * (vocab_size - num_tokens)
        self.special_token_ids = [
            id
            for id in range(num_tokens)
            if id in hidden or (id not in shown and self._tokenizer.is_special_token(id))
        ]
        never = [token.content for token in added if token.id in hidden or token.id >= vocab_size]
        self._never = re.compile("|".join(f"(?={re.escape(content)})" for content in never) or "(?!)")

    def __call__(self, text: str | bytes) -> list[int]:
        """The tokens of ``text``. Text that reads like a special token is cut, so that it becomes
        smaller pieces.
        """
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        cuts = [found.start() + 1 for found in self._never.finditer(text)]
        parts = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        ids = [id for part in parts if part for id in self._tokenizer.tokenize_str(part)]
        if self._is(ids, text):
            return ids
        ids = [id for part in parts if part for id in self._tokenizer.greedy_tokenize(part)]
        if self._is(ids, text):
            return ids
        return [id for char in text for id in self._tokenizer.greedy_tokenize(char)]

    def _is(self, ids: list[int], text: str) -> bool:
        """Whether the tokens are the text, and the logits have a place for each."""
        return max(ids, default=0) < len(self.tokens) and b"".join(
            [self.tokens[id] for id in ids]
        ) == text.encode("utf-8")


def load_vocabulary(model_path: Path, vocab_size: int, eos_ids: tuple[int, ...]) -> LLTokenizer | None:
    """The vocabulary of a checkpoint for matchers; None when the checkpoint has no tokenizer.
    ``vocab_size`` is the width of the logits.

    Call it at start-up, not beside the steps: 152,000 tokens take 0.8 s on an idle core, and no
    other thread runs meanwhile.
    """
    if (model_path / "tokenizer.json").exists():
        text = (model_path / "tokenizer.json").read_text(encoding="utf-8")
    elif any((model_path / name).exists() for name in ("tiktoken.model", "tekken.json")):
        # Imported here because it imports transformers, which takes seconds.
        from .tokenizer import Codec

        text = Codec(model_path).to_json()
    elif is_described_alone(model_path):
        text = build_tokenizer(model_path).to_str()
    else:
        return None
    vocabulary = Vocabulary(text, vocab_size, eos_ids)
    ends = list(eos_ids) or None
    return LLTokenizer(vocabulary, n_vocab=vocab_size, eos_token=ends)  # type: ignore[arg-type]
