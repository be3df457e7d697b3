"""The bytes that each token adds to a text, by token id.

``pieces[token]`` are the bytes of a token inside a text, ``pieces.opening(token)`` those of the
first one: decoders in the manner of SentencePiece drop the space in front of a text. A part of a
character has its true bytes, so the joined bytes of tokens are the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Decoders that write each token by itself, whatever its neighbours. ``Replace`` and ``Strip`` are
# looked at more closely.
_TOKEN_BY_TOKEN = frozenset({"ByteLevel", "ByteFallback", "Fuse", "Metaspace", "WordPiece"})

Parts = list[dict[str, Any]]


def byte_alphabet() -> dict[str, int]:
    """The byte for each character of the byte-level BPE alphabet. Printable ones stand for
    themselves; the others are numbered from 256 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }


class BytePieces(dict[int, bytes]):
    """Pieces of byte-level BPE, filled on first use. ``hidden`` and unknown ids have no bytes."""

    def __init__(
        self, id_to_token: Callable[[int], str | None], hidden: frozenset[int] = frozenset()
    ) -> None:
        super().__init__()
        self._id_to_token = id_to_token
        self._hidden = hidden
        self._alphabet = byte_alphabet()

    def __missing__(self, token: int) -> bytes:
        name = None if token in self._hidden else self._id_to_token(token)
        try:
            piece = bytes(self._alphabet[char] for char in name or "")
        except KeyError:  # an added token, which is written as plain text
            piece = (name or "").encode()
        self[token] = piece
        return piece

    def opening(self, token: int) -> bytes:
        return self[token]


class DecodedPieces(dict[int, bytes]):
    """Pieces of any other tokenizer: the difference that a token makes between two letters, filled
    on first use. ``hidden`` and unknown ids have no bytes. A token ``<0xE4>`` is that byte where
    the decoder has ``byte_tokens``.
    """

    def __init__(self, backend: Any, byte_tokens: bool, hidden: frozenset[int] = frozenset()) -> None:
        super().__init__()
        self._backend = backend
        self._byte_tokens = byte_tokens
        self._hidden = hidden
        self._anchor = _anchor(backend)
        self._before = self._decode(self._anchor)
        self._after = self._decode(self._anchor * 2)[len(self._before) :]

    def __missing__(self, token: int) -> bytes:
        piece = b""
        if token not in self._hidden and self._backend.id_to_token(token) is not None:
            byte = self._byte(token)
            piece = self._between(token).encode() if byte is None else byte
        self[token] = piece
        return piece

    def opening(self, token: int) -> bytes:
        """The bytes of the first token of a text."""
        if not self[token]:
            return b""
        byte = self._byte(token)
        alone = self._decode([token])
        return alone.encode() if byte is None or not alone else byte

    def _byte(self, token: int) -> bytes | None:
        """The byte that a token stands for, None where it stands for text."""
        found = _BYTE_TOKEN.fullmatch(self._backend.id_to_token(token)) if self._byte_tokens else None
        return None if found is None else bytes.fromhex(found[1])

    def _between(self, token: int) -> str:
        text = self._decode([*self._anchor, token, *self._anchor])
        before, after = self._before, self._after
        if not (text.startswith(before) and text.endswith(after) and len(text) >= len(before + after)):
            return self._decode([token])
        return text[len(before) : len(text) - len(after)]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._backend.decode(ids, skip_special_tokens=False)
        return text


def _anchor(backend: Any) -> list[int]:
    """A token that is a letter and nothing else, to put beside others; nothing where there is
    none.
    """
    ids = (backend.token_to_id(chr(letter)) for letter in range(ord("a"), ord("z") + 1))
    return next(([id] for id in ids if id is not None), [])


def parts_of(decoder: dict[str, Any] | None) -> Parts:
    """The steps of the decoder that tokenizer.json describes, in order."""
    if decoder is None:
        return []
    return list(decoder.get("decoders", [])) if decoder.get("type") == "Sequence" else [decoder]


def is_byte_level(parts: Parts) -> bool:
    """Whether decoding joins the bytes of the tokens (byte-level BPE: Qwen, DeepSeek, Llama 3,
    GPT-2).
    """
    return [part.get("type") for part in parts] == ["ByteLevel"]


def has_byte_tokens(parts: Parts) -> bool:
    return any(part.get("type") == "ByteFallback" for part in parts)


def joins_pieces(parts: Parts) -> bool:
    """Whether the pieces of tokens join to their text. False for decoders that look at several
    tokens at once, and for those not known here.
    """
    fused = False
    for part in parts:
        kind = part.get("type")
        fused = fused or kind == "Fuse"
        if kind == "Replace":
            text = part.get("pattern", {}).get("String")
            if text is None or (fused and len(text) > 1):
                return False
        elif kind == "Strip":
            if fused and (part.get("stop", 0) or part.get("start", 0) > 1):
                return False
        elif kind not in _TOKEN_BY_TOKEN:
            return False
    return True
