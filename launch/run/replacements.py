"""Replaces ranks and frontends that die while serving."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass

from ...engine.protocol.cluster_state import ClusterState
from ..cluster.cluster import Cluster, Death, LaunchError

LIMIT = 3
WINDOW_SECONDS = 600.0
FRONTEND_SECONDS = 60.0


@dataclass(frozen=True)
class _Pause:
    """Serving has stopped ``since`` then (monotonic seconds), in ``epoch``, by the last cause."""

    since: float
    epoch: int
    cause: str


class Replacements:
    """Starts a dead rank or frontend again, with the same task.

    Requests wait for a rank and lose nothing; the streams of a frontend end with it. Gives up
    (LaunchError) on a process that died ``LIMIT`` times within the window, on a replacement that
    dies before it is ready, and when the cluster does not serve again within ``deadline`` seconds.
    """

    def __init__(self, cluster: Cluster, deadline: float) -> None:
        self._cluster = cluster
        self._deadline = deadline
        self._deaths: dict[str, list[float]] = {}
        self._pause: _Pause | None = None
        self._waiting = ""
        self._frontends: dict[str, tuple[float, str]] = {}  # started: since when, and the cause

    def replace(self, death: Death, cause: str, *, ready: bool, epoch: int) -> None:
        """Starts the rank of ``death`` again.

        ``ready``: whether the dead process had been ready. ``epoch``: the last known one.
        """
        if not ready and not death.lost_node:
            raise LaunchError(f"{cause}; it was to replace a rank that died before")
        self._start(death, cause)
        if self._pause is None:
            self._pause = _Pause(time.monotonic(), epoch, cause)
        else:
            self._pause = _Pause(self._pause.since, self._pause.epoch, cause)

    def replace_frontend(self, death: Death, cause: str) -> None:
        """Starts the frontend of ``death`` again; the others go on meanwhile."""
        self._start(death, cause)
        self._frontends[death.task.name] = (time.monotonic(), cause)

    def check_ready(self, ready: Collection[str]) -> None:
        """Takes the names of all ready processes.

        Raises LaunchError for a replaced frontend that is not ready after ``FRONTEND_SECONDS``.
        """
        for name, (since, cause) in list(self._frontends.items()):
            if name in ready:
                del self._frontends[name]
            elif time.monotonic() - since > FRONTEND_SECONDS:
                raise LaunchError(f"{cause}; its replacement was not ready within {FRONTEND_SECONDS:g} s")

    def _start(self, death: Death, cause: str) -> None:
        now, name = time.monotonic(), death.task.name
        recent = [at for at in self._deaths.get(name, []) if now - at < WINDOW_SECONDS]
        if len(recent) >= LIMIT and not death.lost_node:
            raise LaunchError(
                f"{cause}; it was replaced {len(recent)} times within {WINDOW_SECONDS:g} s, the limit"
            )
        self._deaths[name] = [*recent, now]
        self._cluster.start([death.task])

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
        seconds = time.monotonic() - self._pause.since
        if state is not None and state.phase in ("serving", "draining") and state.epoch > self._pause.epoch:
            self._pause = None
            return seconds
        if seconds > self._deadline:
            why = f": {self._waiting}" if self._waiting else ""
            raise LaunchError(
                f"{self._pause.cause}; the cluster does not serve again after {self._deadline:g} s{why}"
            )
        return None
