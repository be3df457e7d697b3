"""Bounds on the shape of a JSON text, checked before anything is built from it.

A parser holds the interpreter lock until its last value is built, so the limits bound how long the
event loop is blocked: about 50 ms on an EPYC core for a text at all of them.
"""

from __future__ import annotations

import numpy as np

from .errors import bad_request

PLAIN_BYTES = 65536  # texts up to this size are within all limits, or nearly
MAX_CONTAINERS = 2**16
MAX_MEMBERS = 2**17
MAX_VALUES = 5 * 2**18  # a prompt of a million token ids, and room for the rest
_CHUNK = 2**18
_QUOTE, _BACKSLASH, _BRACE, _COLON, _COMMA = b'"\\{:,'


def check_outline(text: bytes, name: str, param: str | None = None) -> None:
    """Raises ApiError 400 for a JSON text that has too many objects and lists, members of objects,
    or values. ``name`` is what the message calls the text.
    """
    if len(text) <= PLAIN_BYTES:
        return
    limits = (
        (MAX_CONTAINERS, "objects and lists"),
        (MAX_MEMBERS, "members of objects"),
        (MAX_VALUES, "values"),
    )
    most = (text.count(b"{") + text.count(b"["), text.count(b":"), text.count(b","))
    if all(count <= limit for count, (limit, _) in zip(most, limits, strict=True)):
        return
    counts = np.zeros(3, np.int64)
    scan = _Scan()
    for start in range(0, len(text), _CHUNK):
        counts += scan.count(np.frombuffer(text, np.uint8, min(_CHUNK, len(text) - start), start))
        for count, (limit, things) in zip(counts, limits, strict=True):
            if count > limit:
                raise bad_request(f"{name} has more than {limit} {things}", param)


class _Scan:
    """Counts structural characters outside of strings, chunk by chunk."""

    def __init__(self) -> None:
        self._inside = 0  # 1 while the text is inside a string
        self._escaped = False  # the next byte follows a backslash that escapes it

    def count(self, chunk: np.ndarray) -> tuple[int, int, int]:
        """Objects and lists opened, colons and commas in ``chunk``."""
        if self._escaped:
            chunk = chunk.copy()
            chunk[0] = 0
        quotes = chunk == _QUOTE
        self._escaped = False
        slashes = np.flatnonzero(chunk == _BACKSLASH)
        if slashes.size:
            self._drop_escaped(quotes, slashes)
        inside = np.cumsum(quotes, dtype=np.uint8)
        inside += np.uint8(self._inside)
        inside &= 1
        self._inside = int(inside[-1])
        outside = inside == 0
        opened = (chunk | 0x20) == _BRACE
        masks = (opened, chunk == _COLON, chunk == _COMMA)
        containers, colons, commas = (int(np.count_nonzero(mask & outside)) for mask in masks)
        return containers, colons, commas

    def _drop_escaped(self, quotes: np.ndarray, slashes: np.ndarray) -> None:
        """Clears the quotes that follow an odd number of backslashes."""
        first = np.flatnonzero(np.diff(slashes, prepend=-2) != 1)  # starts of runs of backslashes
        lengths = np.diff(first, append=slashes.size)
        after = (slashes[first] + lengths)[lengths % 2 == 1]
        if after.size and after[-1] == quotes.size:
            self._escaped = True
            after = after[:-1]
        quotes[after] = False
