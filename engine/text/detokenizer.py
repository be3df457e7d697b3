"""Tokens to text, one token at a time, never a broken character.

The texts that a detokenizer returns, ``finish`` included, join to the decoding of all tokens.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import Protocol

MAX_BYTES = 4  # most bytes of a UTF-8 character
_Utf8 = codecs.getincrementaldecoder("utf-8")


class Detokenizer(Protocol):
    def push(self, token: int) -> str:
        """The text that is certain with ``token``; empty while a character is incomplete."""

    def finish(self) -> str:
        """Replacement characters for a character that stayed incomplete, else nothing."""


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
    """The bytes of each token id, filled on first use. ``hidden`` and unknown ids have none."""

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


class ByteDetokenizer:
    """For byte-level BPE: passes the tokens' bytes through an incremental UTF-8 decoder."""

    __slots__ = ("_decode", "_pieces")

    def __init__(self, pieces: BytePieces) -> None:
        self._pieces = pieces
        self._decode = _Utf8("replace").decode

    def push(self, token: int) -> str:
        return self._decode(self._pieces[token])

    def finish(self) -> str:
        return self._decode(b"", True)


class WindowDetokenizer:
    """For any other tokenizer: decodes a short window without and with the new tokens, and returns
    the difference.

    The window starts at the last text that was certain, so each token is decoded a bounded number
    of times. ``hidden`` ids have no text.
    """

    __slots__ = ("_decode", "_hidden", "_known", "_window")

    def __init__(self, decode: Callable[..., str], hidden: frozenset[int], prompt: list[int]) -> None:
        self._decode = decode
        self._hidden = hidden
        self._window = [token for token in prompt if token not in hidden]
        self._known = len(self._window)  # tokens of the window whose text has been returned

    def push(self, token: int) -> str:
        if token in self._hidden:
            return ""
        self._window.append(token)
        before, text = self._texts()
        incomplete = text.endswith("\ufffd") and len(self._window) - self._known < MAX_BYTES
        if len(text) <= len(before) or incomplete:
            return ""
        self._window = self._window[self._known :]
        self._known = len(self._window)
        return text[len(before) :]

    def finish(self) -> str:
        before, text = self._texts()
        self._known = len(self._window)
        return text[len(before) :]

    def _texts(self) -> tuple[str, str]:
        """The decoded window without its new tokens, and with them."""
        before = self._decode(self._window[: self._known], skip_special_tokens=False)
        return before, self._decode(self._window, skip_special_tokens=False)
