"""Nodes whose ranks keep dying while those of other nodes live."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection

from ..cluster.cluster import Death
from .replacements import WINDOW_SECONDS

DEATHS = 3
"""One more than a request is replayed before it is ended: a request that kills ranks makes no node
suspect."""


class Quarantine:
    """Counts the deaths of ranks by node. Ranks lost with a node or actor, ranks that the launcher
    moves, and ranks that end because another is lost do not count.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._deaths: defaultdict[int, list[float]] = defaultdict(list)
        self._moving: set[str] = set()

    def take(self, deaths: Collection[Death]) -> list[Death]:
        """Notes deaths. Returns the last one of each node that has become suspect: at least
        ``DEATHS`` ranks died there within ``WINDOW_SECONDS``, and more than twice as many as on all
        other nodes. Its count begins anew.
        """
        now = self._clock()
        last = dict[int, Death]()
        for death in deaths:
            if death.task.node is None or death.lost_with or death.spent:
                continue
            if death.task.name in self._moving:
                self._moving.remove(death.task.name)
                continue
            self._deaths[death.task.node].append(now)
            last[death.task.node] = death
        recent = {
            node: sum(now - at < WINDOW_SECONDS for at in times) for node, times in self._deaths.items()
        }
        total = sum(recent.values())
        suspects = [node for node in last if recent[node] >= DEATHS and 3 * recent[node] > 2 * total]
        for node in suspects:
            self._deaths[node].clear()
        return [last[node] for node in suspects]

    def moves(self, names: Collection[str]) -> None:
        """Excludes ranks that the launcher kills to start them again on another node."""
        self._moving.update(names)
