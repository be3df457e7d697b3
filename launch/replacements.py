"""Ranks that died while serving, and those that take their place."""

from __future__ import annotations

import time

from ..engine.types import ClusterState
from .cluster import Cluster, Death, LaunchError

LIMIT = 3
WINDOW_SECONDS = 600.0


class Replacements:
    """Starts another process for every rank that dies, with the same task; requests wait meanwhile and lose nothing.

    Gives up (LaunchError) on a rank that died ``LIMIT`` times within the window, on a replacement that dies before it is ready, and
    when the cluster does not serve again within ``deadline`` seconds.
    """

    def __init__(self, cluster: Cluster, deadline: float) -> None:
        self._cluster = cluster
        self._deadline = deadline
        self._deaths: dict[str, list[float]] = {}
        self._since: float | None = None
        self._epoch = 0
        self._obituary = ""

    def replace(self, death: Death, obituary: str, *, ready: bool, epoch: int) -> None:
        """Starts the task of ``death`` anew. ``ready``: whether the dead process had been; ``epoch``: the last one known."""
        now, name = time.monotonic(), death.task.name
        if not ready:
            raise LaunchError(f"{obituary}; it was to replace a rank that died before")
        recent = [at for at in self._deaths.get(name, []) if now - at < WINDOW_SECONDS]
        if len(recent) >= LIMIT:
            raise LaunchError(f"{obituary}; it was replaced {len(recent)} times within {WINDOW_SECONDS:g} s, which is the limit")
        self._deaths[name] = [*recent, now]
        if self._since is None:
            self._since, self._epoch = now, epoch
        self._obituary = obituary
        self._cluster.start([death.task])

    def recovered(self, state: ClusterState | None) -> float | None:
        """Seconds the pause took, once, when the cluster serves again. Raises LaunchError after the deadline."""
        if self._since is None:
            return None
        seconds = time.monotonic() - self._since
        if state is not None and state.phase in ("serving", "draining") and state.epoch > self._epoch:
            self._since = None
            return seconds
        if seconds > self._deadline:
            raise LaunchError(f"{self._obituary}; the cluster does not serve again after {self._deadline:g} s")
        return None
