"""Replaces ranks and frontends that die while serving."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from ...engine.protocol.cluster_state import ClusterState
from ..cluster.cluster import Cluster, Death, LaunchError, Task

WINDOW_SECONDS = 600.0
FRONTEND_SECONDS = 60.0
FIRST_DELAY = 1.0
LONGEST_DELAY = 60.0
LONGEST_PAUSE = 20.0  # seconds of delay for a rank, for which all others wait
LONGEST_OUTAGE = 5.0  # seconds of delay where no other frontend serves


@dataclass(frozen=True)
class _Pause:
    """A pause in serving ``since`` (monotonic seconds), in ``epoch``, with its last cause: the loss
    of ``ranks``, or of the controller (None). ``excused``: seconds of it in which the launcher was
    suspended.
    """

    since: float
    epoch: int
    cause: str
    ranks: frozenset[int] | None
    excused: float = 0.0

    def is_over(self, state: ClusterState) -> bool:
        """Whether another epoch serves, or the same one serves without these ranks."""
        lost = {rank.rank for rank in state.ranks if rank.state == "lost"}
        without = self.ranks is not None and self.ranks <= lost
        return state.phase in ("serving", "draining") and (state.epoch > self.epoch or without)


class Replacements:
    """Starts a dead rank or frontend again, with the same task: the first time at once, then after
    a delay that doubles up to ``LONGEST_DELAY`` seconds.

    Requests wait for a rank or the controller and lose nothing, so that its delay stays short; the
    streams of a frontend end with it. Gives up (LaunchError) only when the cluster does not serve
    again within ``deadline`` seconds.
    """

    def __init__(
        self, cluster: Cluster, deadline: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._cluster = cluster
        self._deadline = deadline
        self._clock = clock
        self._deaths: dict[str, list[float]] = {}
        self._due: dict[str, tuple[float, Task]] = {}  # not started yet: start time and task
        self._pause: _Pause | None = None
        self._waiting = ""
        self._frontends: dict[str, float] = {}  # not ready yet: since when it has run or waited

    def replace(self, death: Death, cause: str, *, epoch: int) -> float:
        """Starts the rank of ``death`` again. ``epoch``: the last known one. Returns the delay in
        seconds.
        """
        delay = self._schedule(death, LONGEST_PAUSE)
        ranks = frozenset() if self._pause is None else self._pause.ranks
        self._pause_for(cause, epoch, None if ranks is None else ranks | {death.task.index})
        return delay

    def replace_controller(self, death: Death, cause: str, *, epoch: int) -> float:
        """Starts the task of ``death``, a controller. Returns the delay in seconds, which is short:
        nothing serves meanwhile.
        """
        delay = self._schedule(death, LONGEST_OUTAGE)
        self._pause_for(cause, epoch, None)
        return delay

    def replace_frontend(self, death: Death, *, others: bool) -> float:
        """Starts the frontend of ``death`` again. Returns the delay in seconds, which is short
        where no ``others`` serve.
        """
        delay = self._schedule(death, LONGEST_DELAY if others else LONGEST_OUTAGE)
        self._frontends[death.task.name] = self._clock() + delay
        return delay

    def stood_still(self, seconds: float) -> None:
        """Excuses ``seconds`` in which the launcher was suspended, and perhaps the replacements
        too.
        """
        if self._pause is not None:
            self._pause = replace(self._pause, excused=self._pause.excused + seconds)
        self._frontends = {name: since + seconds for name, since in self._frontends.items()}

    def start_due(self) -> None:
        """Starts the processes whose delay is over."""
        now = self._clock()
        for name in [name for name, (at, _) in self._due.items() if at <= now]:
            _, task = self._due.pop(name)
            self._cluster.start([task])

    def slow_frontends(self, ready: Collection[str]) -> list[str]:
        """Takes the names of all ready processes. Returns the replaced frontends that are not ready
        ``FRONTEND_SECONDS`` after their start.
        """
        now = self._clock()
        self._frontends = {name: since for name, since in self._frontends.items() if name not in ready}
        return [name for name, since in self._frontends.items() if now - since > FRONTEND_SECONDS]

    def degraded(self) -> str:
        """Text that names the missing frontends; empty if there are none."""
        parts = []
        for name in sorted(self._frontends):
            count = len(self._recent(name))
            often = f" (it died {count} times within {WINDOW_SECONDS:g} s)" if count > 1 else ""
            parts.append(f"{name} is being replaced{often}")
        return ", ".join(parts)

    def news(self) -> str:
        """Message when a replacement starts or stops waiting for a node; otherwise empty."""
        before = self._waiting
        self._waiting = "" if self._pause is None else self._cluster.waiting()
        if self._waiting and not before:
            return f"{self._waiting}; waiting up to {self._deadline:g} s for a node to join or come back"
        if before and not self._waiting and self._pause is not None:
            return "a node with room has been found"
        return ""

    def recovered(self, state: ClusterState | None) -> float | None:
        """Length of the pause in seconds, once, when the cluster serves again.

        Raises LaunchError after the deadline.
        """
        if self._pause is None:
            return None
        seconds = self._clock() - self._pause.since
        if state is not None and self._pause.is_over(state):
            self._pause = None
            return seconds
        if seconds > self._deadline + self._pause.excused:
            why = f": {self._waiting}" if self._waiting else ""
            raise LaunchError(
                f"{self._pause.cause}; the cluster does not serve again after {self._deadline:g} s{why}"
            )
        return None

    def _pause_for(self, cause: str, epoch: int, ranks: frozenset[int] | None) -> None:
        if self._pause is None:
            self._pause = _Pause(self._clock(), epoch, cause, ranks)
        else:
            self._pause = replace(self._pause, cause=cause, ranks=ranks)

    def _recent(self, name: str) -> list[float]:
        now = self._clock()
        return [at for at in self._deaths.get(name, []) if now - at < WINDOW_SECONDS]

    def _schedule(self, death: Death, longest: float) -> float:
        """Notes a death and starts the task again, at once or later. Returns the delay. The end of
        a rank because another was lost is not counted as a death.
        """
        name, now = death.task.name, self._clock()
        before = self._recent(name)
        if death.spent:
            before = []
        else:
            self._deaths[name] = [*before, now]
        gone = death.code is None and death.lost_with  # its node, or Ray's part of it
        delay = 0.0 if not before or gone else min(FIRST_DELAY * 2.0 ** (len(before) - 1), longest)
        self._due[name] = (now + delay, death.task)
        self.start_due()
        return delay
