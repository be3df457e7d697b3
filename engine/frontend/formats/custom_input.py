"""Custom tools take a text, not JSON. The model sees a function whose only argument is that text
(``api/tools.py``); its calls are read back here, as they are written.
"""

from __future__ import annotations

import re

_START = re.compile(r'\s*\{\s*"input"\s*:\s*"')
_PLAIN = re.compile(r'[^"\\]+')
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "/": "/", "\\": "\\", '"': '"'}


class CustomInput:
    """Reads the text out of arguments that arrive in parts. Arguments that do not begin as they
    should are the text themselves, once they are complete.
    """

    def __init__(self) -> None:
        self._raw = ""
        self._rest: str | None = None  # raw text not read yet, None before the start of the value
        self._ended = False

    def push(self, part: str) -> str:
        """The text that ``part`` adds."""
        self._raw += part
        if self._rest is None:
            start = _START.match(self._raw)
            if start is None:
                return ""
            self._rest, part = "", self._raw[start.end() :]
        if self._ended:
            return ""
        return self._read(self._rest + part)

    def finish(self) -> str:
        """The text that is left when no more arguments come."""
        return self._raw if self._rest is None else ""

    def _read(self, raw: str) -> str:
        """Decodes the string up to its end, or to an escape that is not complete."""
        parts: list[str] = []
        at = 0
        while at < len(raw):
            if plain := _PLAIN.match(raw, at):
                parts.append(plain[0])
                at = plain.end()
            elif raw[at] == '"':
                self._ended = True
                at = len(raw)
            else:
                text, length = _escape(raw, at)
                if not length:
                    break
                parts.append(text)
                at += length
        self._rest = raw[at:]
        return "".join(parts)


def _escape(raw: str, at: int) -> tuple[str, int]:
    """The text of the escape at ``at`` and its length, 0 while it is not complete."""
    if len(raw) < at + 2:
        return "", 0
    if raw[at + 1] != "u":
        return _ESCAPES.get(raw[at + 1], raw[at + 1]), 2
    unit = _unit(raw, at)
    if unit is None:
        return "", 0
    if not 0xD800 <= unit < 0xDC00:
        return ("�" if 0xDC00 <= unit < 0xE000 else chr(unit)), 6
    if len(raw) < at + 8 and "\\u".startswith(raw[at + 6 : at + 8]):
        return "", 0
    if raw[at + 6 : at + 8] != "\\u":
        return "�", 6
    low = _unit(raw, at + 6)
    if low is None:
        return "", 0
    if not 0xDC00 <= low < 0xE000:
        return "�", 6
    return chr(0x10000 + ((unit - 0xD800) << 10) + (low - 0xDC00)), 12


def _unit(raw: str, at: int) -> int | None:
    """The code unit of a complete ``\\uXXXX``."""
    digits = raw[at + 2 : at + 6]
    if len(digits) < 4:
        return None
    return int(digits, 16) if re.fullmatch(r"[0-9a-fA-F]{4}", digits) else 0xFFFD
