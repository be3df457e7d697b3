"""A reader of text that is still arriving, for parsers written as if all of it were there.

A parser is a generator: it yields where it needs text that has not come, and goes on when more has
come or the text has ended. Every decision waits until its text is complete, so the result never
depends on how the text was cut.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

T = TypeVar("T")
Steps = Generator[None, None, T]
Sink = Callable[[str], None]

SPACE = " \t\r\n"
NEWLINES = "\r\n"
MAX_HEAD = 256  # most characters of a name


class Reader:
    """A cursor over the text. ``position`` counts characters from the start. Committed text is
    forgotten.
    """

    __slots__ = ("_at", "_base", "_floor", "_pinned", "_text", "ended")

    def __init__(self) -> None:
        self._text = ""
        self._base = 0  # position of the first character of _text
        self._at = 0  # index of the cursor in _text
        self._floor = 0  # index in _text of the first character that may still be needed
        self._pinned = False
        self.ended = False

    def feed(self, text: str) -> None:
        """Adds text, after dropping all before the last commit."""
        self._text = self._text[self._floor :] + text
        self._base += self._floor
        self._at -= self._floor
        self._floor = 0

    @property
    def position(self) -> int:
        return self._base + self._at

    def commit(self) -> None:
        """Gives up the text before the cursor, unless it is pinned."""
        if not self._pinned:
            self._floor = self._at

    def pin(self) -> int:
        """Returns the position of the cursor, to which ``rewind`` may go until ``release``. Pins do
        not nest: the first one holds.
        """
        self._pinned = True
        return self.position

    def release(self) -> None:
        """Drops the pin and commits the text read since."""
        self._pinned = False
        self.commit()

    def rewind(self, pin: int) -> None:
        """Moves the cursor back to ``pin``, which is released."""
        assert self._pinned, "rewound without a pin"
        self._at = pin - self._base
        self.release()

    def back(self, num_chars: int) -> None:
        """Moves the cursor back over characters just taken, which must be pinned."""
        assert self._pinned
        self._at -= num_chars

    def peek(self) -> Steps[str]:
        """The next character; empty at the end of the text."""
        while self._at == len(self._text):
            if self.ended:
                return ""
            yield
        return self._text[self._at]

    def glance(self) -> str:
        """The next character if it has come, else empty; ``peek`` waits for it."""
        return self._text[self._at : self._at + 1]

    def ahead(self, num_chars: int) -> Steps[str]:
        """The next ``num_chars`` characters, fewer at the end of the text; the cursor stays."""
        while len(self._text) - self._at < num_chars and not self.ended:
            yield
        return self._text[self._at : self._at + num_chars]

    def since(self, pin: int) -> str:
        """The text between ``pin`` and the cursor."""
        assert self._pinned
        return self._text[pin - self._base : self._at]

    def step(self, num_chars: int) -> None:
        """Moves past characters that ``peek`` or ``ahead`` has shown, and commits them."""
        self._at += num_chars
        self.commit()

    def skip(self, chars: str) -> Steps[str]:
        """Moves past the run of ``chars`` at the cursor; returns the run."""
        start = self.position
        while (char := (yield from self.peek())) and char in chars:
            self._at += 1
        return self._text[start - self._base : self._at]

    def take(self, literal: str) -> Steps[bool]:
        """Moves past ``literal`` if it comes next; returns whether it did."""
        while True:
            if self._text.startswith(literal, self._at):
                self._at += len(literal)
                return True
            if self.ended or not literal.startswith(self._text[self._at :]):
                return False
            yield

    def head(self, *ends: str) -> Steps[str | None]:
        """Returns the text up to the first of ``ends`` and moves past that one. None, without
        moving, if none comes within MAX_HEAD characters.
        """
        longest = max(map(len, ends))
        while True:
            limit = self._at + MAX_HEAD + longest
            found = [(self._text.find(end, self._at, limit), end) for end in ends]
            hits = [(start, end) for start, end in found if start >= 0]
            if hits:
                start, end = min(hits)
                text = self._text[self._at : start]
                self._at = start + len(end)
                return text
            if self.ended or len(self._text) >= limit:
                return None
            yield

    def run(self, until: Callable[[str, int], int], sink: Sink) -> Steps[bool]:
        """Passes on and commits text up to the index that ``until(text, start)`` finds (-1: not in
        this text). False if the text ends first.
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

    def scan(self, markers: Sequence[str], sink: Sink, past: bool = True) -> Steps[str | None]:
        """Passes on the text up to the first of ``markers``, moves past the marker (or, without
        ``past``, up to it), commits, and returns the marker. None if the text ends first, all of it
        passed on.

        Text that may be the start of a marker is held back.
        """
        while True:
            found = [(self._text.find(marker, self._at), marker) for marker in markers]
            hits = [(start, marker) for start, marker in found if start >= 0]
            start, marker = min(hits) if hits else (self._undecided(markers), None)
            if start > self._at:
                sink(self._text[self._at : start])
            self._at = start + (len(marker or "") if past else 0)
            self.commit()
            if marker is not None:
                return marker
            if self.ended:
                return None
            yield

    def _undecided(self, markers: Sequence[str]) -> int:
        """Index at which the longest suffix of the text starts that may become a marker."""
        text = self._text
        end = len(text)
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
