"""Tokens to text, one token at a time, never a broken character.

The texts that a detokenizer returns, ``finish`` included, join to the decoding of all tokens.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import Protocol

from .pieces import BytePieces, DecodedPieces

MAX_BYTES = 4  # most bytes of a UTF-8 character
_Utf8 = codecs.getincrementaldecoder("utf-8")


class Detokenizer(Protocol):
    def push(self, token: int) -> str:
        """The text that is certain with ``token``; empty while a character is incomplete."""

    def finish(self) -> str:
        """Replacement characters for a character that stayed incomplete, else nothing."""


class ByteDetokenizer:
    """For tokenizers whose pieces join to the text: passes the tokens' bytes through an incremental
    UTF-8 decoder.
    """

    __slots__ = ("_decode", "_pieces")

    def __init__(self, pieces: BytePieces | DecodedPieces) -> None:
        self._pieces = pieces
        self._decode = _Utf8("replace").decode

    def push(self, token: int) -> str:
        return self._decode(self._pieces[token])

    def finish(self) -> str:
        return self._decode(b"", True)


class OpeningDetokenizer:
    """The same for a text that begins with the first token that has one, which may lose a space."""

    __slots__ = ("_decode", "_opened", "_pieces")

    def __init__(self, pieces: DecodedPieces) -> None:
        self._pieces = pieces
        self._decode = _Utf8("replace").decode
        self._opened = False

    def push(self, token: int) -> str:
        piece = self._pieces[token]
        if not self._opened and piece:
            self._opened = True
            piece = self._pieces.opening(token)
        return self._decode(piece)

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
