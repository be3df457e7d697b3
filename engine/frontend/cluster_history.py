"""The last changes of the cluster that this frontend has received, with their times.

A state has no times, which someone who looks at a cluster in trouble needs first.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from ..protocol.cluster_state import ClusterState

MOST_EVENTS = 100


class ClusterHistory:
    """Compares each state with the one before. ``clock`` is Unix time.

    A frontend that started later than the cluster has no events before its first state.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._state: ClusterState | None = None
        self._heard = self._phase_since = 0.0
        self._rank_since: dict[int, float] = {}
        self._events: deque[dict[str, Any]] = deque(maxlen=MOST_EVENTS)

    def heard(self, state: ClusterState) -> None:
        """Takes in a state from the controller."""
        before, self._state, now = self._state, state, self._clock()
        self._heard = now
        if before is None or before.phase != state.phase:
            self._phase_since = now
        known = {} if before is None else {rank.rank: (rank.state, rank.pid) for rank in before.ranks}
        for rank in state.ranks:
            if known.get(rank.rank) != (rank.state, rank.pid):
                self._rank_since[rank.rank] = now
        self._events += [{"time": now, **event} for event in _changes(before, state)]

    def describe(self) -> dict[str, Any]:
        """``time`` is the current time, ``heard`` that of the last state, ``since`` that of its
        phase, ``rank_since`` [rank] that of each rank's state; ``events``, the oldest first, are a
        ``kind`` (phase, rank, epoch, degraded or preemption) and a ``text``.
        """
        ranks = () if self._state is None else self._state.ranks
        return {
            "time": self._clock(),
            "heard": self._heard,
            "since": self._phase_since,
            "rank_since": [self._rank_since[rank.rank] for rank in ranks],
            "events": list(self._events),
        }


def _changes(before: ClusterState | None, state: ClusterState) -> Iterator[dict[str, str]]:
    """Events between two states; for the first one, what this frontend found."""
    if before is None or before.epoch != state.epoch:
        began = "epoch %d begins" if before else "this frontend starts in epoch %d"
        yield {"kind": "epoch", "text": began % state.epoch}
    if before is None or (before.phase, before.reason) != (state.phase, state.reason):
        yield {"kind": "phase", "text": f"{state.phase}: {state.reason}" if state.reason else state.phase}
    if before is None:
        return
    known = {rank.rank: rank for rank in before.ranks}
    for rank in state.ranks:
        earlier = known.get(rank.rank)
        if earlier is not None and (earlier.state, earlier.pid) != (rank.state, rank.pid):
            process = f" as process {rank.pid}" if earlier.pid != rank.pid else ""
            yield {"kind": "rank", "text": f"rank {rank.rank} on {rank.host}: {rank.state}{process}"}
    if before.degraded != state.degraded:
        text = f"degraded: {state.degraded}" if state.degraded else f"no longer degraded: {before.degraded}"
        yield {"kind": "degraded", "text": text}
    if state.preemptions > before.preemptions:
        count = state.preemptions - before.preemptions
        yield {"kind": "preemption", "text": f"{count} running request{'s' * (count > 1)} gave way: KV full"}
