"""Notices that the own process stood still: stopped, suspended with its machine, or out of CPU."""

from __future__ import annotations

LONGEST_TURN = 2.0
"""Seconds that no turn of a loop takes, though it waits for messages in between."""

SETTLED_SECONDS = 5.0
"""Seconds after a standstill in which messages of all peers come in: they may have stood still too,
and their connections may have to be made again."""


class Turns:
    """Watches the turns of a loop. Silence of peers says nothing while the own process stood still,
    nor until their messages have had time to come in. Times are monotonic seconds.
    """

    def __init__(self, now: float) -> None:
        self._last = now
        self._settled_at = now

    def take(self, now: float) -> float:
        """A turn begins. Returns for how long this process stood still before it, 0 if it did
        not.
        """
        gap = now - self._last
        self._last = now
        if gap <= LONGEST_TURN:
            return 0.0
        self._settled_at = now + SETTLED_SECONDS
        return gap

    def settled(self, now: float) -> bool:
        """Whether silence of peers may be judged."""
        return now >= self._settled_at
