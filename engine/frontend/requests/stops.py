"""When a generation stops before its length limit, and how stop strings are found in its text."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopRule:
    """The stop ids and stop strings of a request.

    ``eos_ids`` are those of ``ids`` that the model ends its texts with and the client did not name:
    the client is told no stop reason for them. ``include``: the text that stops a generation is
    shown. The engine stops at ids by itself; strings are found here.
    """

    ids: frozenset[int]
    eos_ids: frozenset[int]
    strings: tuple[str, ...] = ()
    include: bool = False

    def packed_i32(self) -> bytes:
        """The ids as the engine gets them."""
        return array("i", sorted(self.ids)).tobytes()

    def matcher(self) -> StopMatcher | None:
        """A new matcher for one generation, None where there are no stop strings."""
        return StopMatcher(self.strings, self.include) if self.strings else None


class StopMatcher:
    """Finds the stop string that completes first, however the text is cut; of several that complete
    together, the one that starts first.

    ``push`` returns text that no stop string can claim any more; text that may be the start of one
    is held back. After a match ``matched`` names the stop string and nothing more may be pushed.
    """

    __slots__ = ("_held", "_ignored", "_include", "_reach", "_stops", "matched")

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        self.matched: str | None = None
        self._stops = tuple(stops)
        self._include = include
        self._reach = max(map(len, stops)) - 1
        self._held = ""
        self._ignored = 0  # a match must end after this many characters of the held text

    def push(self, text: str, armed: bool = True) -> str:
        """Takes the text of the next token. A stop string that completes in text that is not
        ``armed`` (before min_tokens) does not count.
        """
        buffer = self._held + text
        if armed:
            match = self._first(buffer)
            if match is not None:
                end, start, self.matched = match
                self._held = ""
                return buffer[:end] if self._include else buffer[:start]
        else:
            self._ignored = len(buffer)
        cut = self._undecided(buffer)
        self._held = buffer[cut:]
        self._ignored = max(0, self._ignored - cut)
        return buffer[:cut]

    def finish(self) -> str:
        """The text still held back when the sequence ends for another reason."""
        held = self._held
        self._held = ""
        return held

    def _first(self, buffer: str) -> tuple[int, int, str] | None:
        found = []
        for stop in self._stops:
            start = buffer.find(stop, max(0, self._ignored - len(stop) + 1))
            if start >= 0:
                found.append((start + len(stop), start, stop))
        return min(found) if found else None

    def _undecided(self, buffer: str) -> int:
        """Index at which the longest suffix starts that is a proper prefix of a stop string."""
        for start in range(max(0, len(buffer) - self._reach), len(buffer)):
            tail = buffer[start:]
            if any(len(tail) < len(stop) and stop.startswith(tail) for stop in self._stops):
                return start
        return len(buffer)
