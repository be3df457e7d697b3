"""Counts the tokens of a reply's reasoning, for ``usage``."""

from __future__ import annotations

from array import array
from bisect import bisect_left

from ..formats.parser import ReplyParser


class ReasoningTokens:
    """Notes where each token begins in the text of a reply, until its reasoning is over. The parser
    knows where the reasoning lies in that text; the tags around it do not count.
    """

    __slots__ = ("_length", "_parser", "_starts")

    def __init__(self, parser: ReplyParser) -> None:
        self._parser = parser
        self._starts = array("I")
        self._length = 0

    def add(self, text: str) -> None:
        """Takes the text of the next token."""
        self._starts.append(self._length)
        self._length += len(text)

    @property
    def over(self) -> bool:
        """Ends the count: no later token belongs to the reasoning."""
        return self._parser.reasoning_over

    @property
    def count(self) -> int:
        begin, end = self._parser.reasoning_from, self._parser.reasoning_to
        if begin is None:
            return 0
        last = len(self._starts) if end is None else bisect_left(self._starts, end)
        return max(0, last - bisect_left(self._starts, begin))
