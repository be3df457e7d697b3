"""When the next plan leaves: as late as punctuality allows, so that a new request does not wait a
whole step.

The ranks always have one plan in hand while they execute another. The one after that could be sent
at once; sent later it carries what has arrived meanwhile. It must be there before the step in hand
ends.
"""

from __future__ import annotations

import math

# Of a step: what its length may be mistaken by, and what a plan takes to be made and to arrive.
# Where little is left of a step a plan leaves at once, which also spares the controller from being
# woken twice: it may share its cores with ranks.
_MARGIN_SHARE = 0.3
_MARGIN = 0.006


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
        """The first result of a step is in: ``in_flight`` plans are ahead of the next one, each
        taking ``step_seconds``.
        """
        self._idle = False
        self._last_heard = now
        slack = in_flight * step_seconds * (1 - _MARGIN_SHARE) - _MARGIN if self._enabled else 0.0
        self._due_at = now + max(0.0, slack)

    def work_arrived(self) -> None:
        """A request or a staged prompt has come in."""
        self._idle = False

    def sent(self, now: float) -> None:
        """A plan has left; the next is due when a result comes in, or at once while the depth is
        not used up.
        """
        self._due_at = now

    def nothing_to_do(self) -> None:
        """The planner had no work: ask again when something arrives."""
        self._idle = True

    def all_answered(self, now: float) -> None:
        """No rank owes a result."""
        self._last_heard = now

    def silent_for(self, now: float) -> float:
        """Seconds since a first result came in while some were owed."""
        return now - self._last_heard
