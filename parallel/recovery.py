"""Recovery grades: the steps of a rank after a peer is lost, by the transport that carried their
exchange. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

Recovery = Literal["mask", "regroup", "abort and recapture", "process restart"]
"""mask: the exchange goes on without the peer. regroup: the rank meets the others in a new group.
abort and recapture: kernels that hang are aborted, then as before, and graphs are captured again.
process restart: the process ends and is replaced."""

REGROUP: Recovery = "regroup"
ABORT_AND_RECAPTURE: Recovery = "abort and recapture"
PROCESS_RESTART: Recovery = "process restart"


SPENT_STATUS = 75
"""Exit status of a process that ends because of ``ProcessSpent``."""


class ProcessSpent(RuntimeError):
    """This process cannot join another epoch; the launcher replaces it. That is no fault of its
    own.
    """


def gravest(grades: Iterable[Recovery]) -> Recovery:
    """The grade that costs most."""
    return max(grades, key=get_args(Recovery).index)
