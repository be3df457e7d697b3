"""Moves of experts between ranks, as plans start and commit them.

Moves travel one after another, beside the steps. Once every rank of the stage has its part, the
next plan at a border between reports commits them, so that each report of loads has one placement.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from ...moe.balance.travel import MOST_STAGED
from ...parallel.mesh import Mesh
from ..protocol.plan import Transfer
from ..protocol.results import StepResult

_REPEATED = 2 * MOST_STAGED
"""Commits that the first plan of an epoch repeats: some rank may have missed the last ones."""


class ExpertMoves:
    """``committed`` is the id of the last moves that a plan has made part of the placement."""

    def __init__(self, mesh: Mesh, committed: int = 0) -> None:
        self.committed = committed
        self._mesh = mesh
        self._waiting: deque[Transfer] = deque()
        self._travelling: Transfer | None = None
        self._arrived: set[int] = set()  # ranks
        self._landed: list[Transfer] = []
        self._recent: deque[int] = deque(maxlen=_REPEATED)  # committed

    @property
    def num_open(self) -> int:
        """Moves that are not committed yet."""
        return len(self._waiting) + (self._travelling is not None) + len(self._landed)

    def offer(self, moves: Sequence[Transfer]) -> None:
        """Takes moves that follow one another, when none is open."""
        assert not self.num_open, f"{self.num_open} moves are open"
        assert all(later.id > self.committed for later in moves), "ids of moves rise"
        self._waiting += moves

    def plan(self, *, border: bool, first: bool) -> tuple[tuple[Transfer, ...], tuple[int, ...]]:
        """The moves that a plan starts, and the ids of those it commits. ``border``: it is the
        first after a report of loads; ``first``: of an epoch.
        """
        commits = tuple(self._recent) if first else ()
        if border and self._landed:
            landed = tuple(moves.id for moves in self._landed)
            self._landed.clear()
            self._recent += landed
            self.committed = landed[-1]
            commits += landed
        if self._travelling is not None or not self._waiting or len(self._landed) >= MOST_STAGED - 1:
            return (), commits
        self._travelling = self._waiting.popleft()
        self._arrived.clear()
        return (self._travelling,), commits

    def landed(self, result: StepResult) -> None:
        """Books the moves that a rank has received."""
        moves = self._travelling
        if moves is None or moves.id not in np.frombuffer(result.landed_i32, np.int32):
            return
        if self._mesh.coordinates(result.rank).stage == moves.stage:
            self._arrived.add(result.rank)
        if len(self._arrived) == self._mesh.experts:
            self._landed.append(moves)
            self._travelling = None

    def placed(self, version: int) -> None:
        """Books that ranks loaded the placement ``version`` instead of moving experts. None is
        open.
        """
        assert not self.num_open and version > self.committed, f"placement {version} after {self.committed}"
        self.committed = version

    def begin_epoch(self) -> None:
        """Drops moves that are not committed."""
        self._waiting.clear()
        self._landed.clear()
        self._travelling = None
