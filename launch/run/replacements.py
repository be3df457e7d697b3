"""Processes that died while serving, and those that take their place."""

from __future__ import annotations

import time
from collections.abc import Collection

from ...engine.protocol.cluster_state import ClusterState
from ..cluster.cluster import Cluster, Death, LaunchError

LIMIT = 3
WINDOW_SECONDS = 600.0
FRONTEND_SECONDS = 60.0


class Replacements:
    """Starts another process for every rank and every frontend that dies, with the same task.

    Requests wait for a rank and lose nothing; the streams of a frontend end with it. Gives up
    (LaunchError) on a process that died ``LIMIT`` times within the window, on a rank that dies
    before it is ready, and when the cluster does not serve again within ``deadline`` seconds.
    """

    def __init__(self, cluster: Cluster, deadline: float) -> None:
        self._cluster = cluster
        self._deadline = deadline
        self._deaths: dict[str, list[float]] = {}
        self._since: float | None = None
        self._epoch = 0
        self._obituary = ""
        self._waiting = ""
        self._awaited: dict[str, tuple[float, str]] = {}

    def replace(self, death: Death, obituary: str, *, ready: bool, epoch: int) -> None:
        """Starts the rank of ``death`` anew. ``ready``: whether the dead process had been;
        ``epoch``: the last one known.
        """
        if not ready and not death.lost_node:
            raise LaunchError(f"{obituary}; it was to replace a rank that died before")
        self._start(death, obituary)
        if self._since is None:
            self._since, self._epoch = time.monotonic(), epoch
        self._obituary = obituary

    def replace_frontend(self, death: Death, obituary: str) -> None:
        """Starts the frontend of ``death`` anew; the others go on meanwhile."""
        self._start(death, obituary)
        self._awaited[death.task.name] = (time.monotonic(), obituary)

    def check_ready(self, ready: Collection[str]) -> None:
        """``ready``: names of the processes that are. Raises LaunchError for a frontend that is not
        after ``FRONTEND_SECONDS``.
        """
        for name, (since, obituary) in list(self._awaited.items()):
            if name in ready:
                del self._awaited[name]
            elif time.monotonic() - since > FRONTEND_SECONDS:
                raise LaunchError(
                    f"{obituary}; the one in its place was not ready within {FRONTEND_SECONDS:g} s"
                )

    def _start(self, death: Death, obituary: str) -> None:
        now, name = time.monotonic(), death.task.name
        recent = [at for at in self._deaths.get(name, []) if now - at < WINDOW_SECONDS]
        if len(recent) >= LIMIT and not death.lost_node:
            raise LaunchError(
                f"{obituary}; it was replaced {len(recent)} times within {WINDOW_SECONDS:g} s, which is the limit"
            )
        self._deaths[name] = [*recent, now]
        self._cluster.start([death.task])

    def news(self) -> str:
        """That a replacement waits for a node, or no longer does; once each, else empty."""
        before, self._waiting = self._waiting, self._cluster.waiting() if self._since is not None else ""
        if self._waiting and not before:
            return f"{self._waiting}; waiting up to {self._deadline:g} s for a node to join or come back"
        return (
            "a node with room has been found"
            if before and not self._waiting and self._since is not None
            else ""
        )

    def recovered(self, state: ClusterState | None) -> float | None:
        """Seconds the pause took, once, when the cluster serves again. Raises LaunchError after the
        deadline.
        """
        if self._since is None:
            return None
        seconds = time.monotonic() - self._since
        if state is not None and state.phase in ("serving", "draining") and state.epoch > self._epoch:
            self._since = None
            return seconds
        if seconds > self._deadline:
            why = f": {self._waiting}" if self._waiting else ""
            raise LaunchError(
                f"{self._obituary}; the cluster does not serve again after {self._deadline:g} s{why}"
            )
        return None
