"""Decides when the next plan leaves: as late as punctuality allows, so that a new request does not
wait a whole step.

Ranks always have one plan in hand while they execute another. The plan after those could be sent at
once. Sent later it carries the requests that have arrived meanwhile, but it must arrive before the
step in hand ends.
"""

from __future__ import annotations

import math

_MARGIN_SHARE = 0.3
"""Share of a step by which its predicted length may be wrong."""

_MARGIN = 0.006
"""Seconds to make a plan and deliver it. When less of a step is left, the plan leaves at once: the
controller may share its cores with ranks, and wakes only once."""


class Pacer:
    """Decides when a plan is due; times are seconds of one monotonic clock."""

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._due_at = 0.0
        self._idle = False
        self._last_heard = 0.0

    def due(self, now: float) -> bool:
        """Whether a plan may leave now."""
        return not self._idle and now >= self._due_at

    def wait(self, now: float) -> float:
        """Seconds until a plan is due; infinity when only an event can bring work."""
        if self._idle:
            return math.inf
        return max(0.0, self._due_at - now)

    def first_result(self, now: float, in_flight: int, step_seconds: float) -> None:
        """The first result of a step is in. ``in_flight`` plans come before the next one, and each
        takes ``step_seconds``.
        """
        self._idle = False
        self._last_heard = now
        slack = in_flight * step_seconds * (1 - _MARGIN_SHARE) - _MARGIN if self._enabled else 0.0
        self._due_at = now + max(0.0, slack)

    def work_arrived(self) -> None:
        """A request or a staged prompt has come in."""
        self._idle = False

    def sent(self, now: float) -> None:
        """A plan has left. The next is due at the next result, or at once while fewer plans are in
        flight than allowed.
        """
        self._due_at = now

    def nothing_to_do(self) -> None:
        """The planner had no work: ask again when something arrives."""
        self._idle = True

    def all_answered(self, now: float) -> None:
        """No rank owes a result."""
        self._last_heard = now

    def silent_for(self, now: float) -> float:
        """Seconds without a first result while some were owed."""
        return now - self._last_heard
