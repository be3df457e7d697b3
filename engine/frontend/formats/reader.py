"""Text that is still arriving, for parsers that are written as if it were all there.

A parser is a generator: where it needs text that has not come it yields, and goes on when there is
more or when the text has ended. What it does depends on the text alone, never on how the text was
cut, because every decision waits until its text is complete.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

T = TypeVar("T")
Steps = Generator[None, None, T]
Sink = Callable[[str], None]

SPACE = " \t\r\n"
NEWLINES = "\r\n"
MAX_HEAD = 256  # characters of a name: what does not end within them is no name


class Reader:
    """A cursor over the text. ``position`` counts characters from the start; what was committed is
    forgotten.
    """

    __slots__ = ("_at", "_base", "_floor", "_pinned", "_text", "ended")

    def __init__(self) -> None:
        self._text = ""
        self._base = 0  # position of the first character of _text
        self._at = 0  # index of the cursor in _text
        self._floor = 0  # index before which nothing is needed any more
        self._pinned = False
        self.ended = False

    def feed(self, text: str) -> None:
        """More text. Everything before the last commit is dropped first."""
        self._text = self._text[self._floor :] + text
        self._base += self._floor
        self._at -= self._floor
        self._floor = 0

    @property
    def position(self) -> int:
        return self._base + self._at

    def commit(self) -> None:
        """The parser will not go back behind the cursor, unless to a pin before it."""
        if not self._pinned:
            self._floor = self._at

    def pin(self) -> int:
        """The position of the cursor, to which ``rewind`` may go until ``release``. Pins do not
        nest: the first one holds.
        """
        self._pinned = True
        return self.position

    def release(self) -> None:
        """What was read since the pin stands."""
        self._pinned = False
        self.commit()

    def rewind(self, pin: int) -> None:
        """Back to ``pin``, which is released."""
        assert self._pinned, "rewound without a pin"
        self._at = pin - self._base
        self.release()

    def back(self, num_chars: int) -> None:
        """Back over characters that were just taken; the cursor must be behind a pin."""
        assert self._pinned
        self._at -= num_chars

    def peek(self) -> Steps[str]:
        """The next character; empty at the end of the text."""
        while self._at == len(self._text):
            if self.ended:
                return ""
            yield
        return self._text[self._at]

    def skip(self, chars: str) -> Steps[str]:
        """Moves behind the run of ``chars`` at the cursor; returns the run."""
        start = self.position
        while (char := (yield from self.peek())) and char in chars:
            self._at += 1
        return self._text[start - self._base : self._at]

    def take(self, literal: str) -> Steps[bool]:
        """Moves behind ``literal`` if it comes next."""
        while True:
            if self._text.startswith(literal, self._at):
                self._at += len(literal)
                return True
            if self.ended or not literal.startswith(self._text[self._at :]):
                return False
            yield

    def head(self, end: str) -> Steps[str | None]:
        """The text up to ``end``, moving behind it; None, without moving, where it does not come
        within MAX_HEAD characters.
        """
        while True:
            limit = self._at + MAX_HEAD + len(end)
            found = self._text.find(end, self._at, limit)
            if found >= 0:
                text = self._text[self._at : found]
                self._at = found + len(end)
                return text
            if self.ended or len(self._text) >= limit:
                return None
            yield

    def run(self, until: Callable[[str, int], int], sink: Sink) -> Steps[bool]:
        """Gives out and commits text up to the index that ``until(text, start)`` finds (-1: not in
        this text).

        False where the text ends first.
        """
        while True:
            found = until(self._text, self._at)
            stop = len(self._text) if found < 0 else found
            if stop > self._at:
                sink(self._text[self._at : stop])
                self._at = stop
                self.commit()
            if found >= 0:
                return True
            if self.ended:
                return False
            yield

    def scan(self, markers: Sequence[str], sink: Sink) -> Steps[str | None]:
        """Gives out and commits the text up to the first of ``markers``, moves behind it
        (committing) and returns it.

        None at the end of the text, all of which has been given out. Text that may be the start of
        a marker is held back.
        """
        while True:
            hits = [
                (start, marker) for marker in markers if (start := self._text.find(marker, self._at)) >= 0
            ]
            start, marker = min(hits) if hits else (self._undecided(markers), None)
            if start > self._at:
                sink(self._text[self._at : start])
            self._at = start + len(marker or "")
            self.commit()
            if marker is not None:
                return marker
            if self.ended:
                return None
            yield

    def _undecided(self, markers: Sequence[str]) -> int:
        """Where the longest suffix of the text starts that may become a marker."""
        text, end = self._text, len(self._text)
        if self.ended:
            return end
        first = end
        for marker in markers:
            start = text.find(marker[0], max(self._at, end - len(marker) + 1))
            while 0 <= start < first:
                if marker.startswith(text[start:]):
                    first = start
                start = text.find(marker[0], start + 1)
        return first
