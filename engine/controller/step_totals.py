"""Totals over a group's steps, for the metrics: kept as arrays on the step thread, packed when a
state is sent.

Suffixes: D data indices, W ranks, L MoE layers, P phases of such a layer.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np

from ...moe.phases import PHASES
from ...parallel.mesh import Mesh
from ..protocol.arrays import Int64
from ..protocol.cluster_state import PLAN_SECONDS, STEP_TOKENS, Totals
from ..protocol.plan import Header, Transfer
from ..protocol.results import StepResult


class StepTotals:
    """Sums over the steps of one group. ``layers``: the MoE layers of each pipeline stage, whose
    experts take ``expert_bytes`` each.
    """

    def __init__(self, mesh: Mesh, layers: Sequence[slice], expert_bytes: int) -> None:
        world, num_layers = mesh.world, layers[-1].stop
        self._layers_W = [layers[mesh.coordinates(rank).stage] for rank in range(world)]
        self._plan_counts = [0] * (len(PLAN_SECONDS) + 1)
        self._step_counts = [0] * (len(STEP_TOKENS) + 1)
        self._plan_seconds = 0.0
        self._tokens_D = np.zeros(mesh.data, np.int64)
        self._last_D = np.zeros(mesh.data, np.int64)
        self._rows = self._dispatch_rows = self._overlapped = self._moved = 0
        self._overlap = False
        self._busy_W = np.zeros(world)
        self._waited_W = np.zeros(world)
        self._phases_WP = np.zeros((world, len(PHASES)))
        self._load_LW = np.zeros((num_layers, world), np.int64)
        self._last_load_LW = np.zeros((num_layers, world), np.int64)
        self._expert_bytes = expert_bytes

    def planned(self, seconds: float, header: Header, tokens_D: Int64, rows: int) -> None:
        """A plan was sent after ``seconds``; its sections compute tokens_D tokens in ``rows`` rows,
        padding included.
        """
        self._plan_counts[bisect_left(PLAN_SECONDS, seconds)] += 1
        self._plan_seconds += seconds
        self._tokens_D += tokens_D
        self._last_D = tokens_D
        self._step_counts[bisect_left(STEP_TOKENS, int(tokens_D.sum()))] += 1
        self._rows += rows
        self._dispatch_rows += header.capacity * len(tokens_D)
        self._overlap = header.microbatches > 1
        self._overlapped += self._overlap
        self._moved += sum(_num_experts(moves) for moves in header.moves) * self._expert_bytes

    def observed(self, results: Sequence[StepResult]) -> None:
        """Takes in results; a rank may be among them more than once."""
        ranks = [result.rank for result in results]
        waited = np.array([result.waited for result in results])
        np.add.at(self._waited_W, ranks, waited)
        np.add.at(self._busy_W, ranks, np.array([result.seconds for result in results]) - waited)

    def reported(self, result: StepResult) -> None:
        """Takes in the counts that a rank was asked for: expensive, so kept off the planning
        path.
        """
        if result.phases_f32:
            self._phases_WP[result.rank] += np.frombuffer(result.phases_f32, np.float32)
        if result.expert_i64 and len(self._load_LW):
            mine = self._layers_W[result.rank]
            num_layers = mine.stop - mine.start
            counts_L = np.frombuffer(result.expert_i64, np.int64).reshape(num_layers, -1).sum(axis=1)
            self._last_load_LW[mine, result.rank] = counts_L
            self._load_LW[mine, result.rank] += counts_L

    def pack(self) -> Totals:
        """Balancedness of a layer is mean load / maximum load over ranks."""
        most_L = self._last_load_LW.max(axis=1, initial=0)
        balanced_L = np.where(most_L > 0, self._last_load_LW.mean(axis=1) / np.maximum(most_L, 1), 1.0)
        return Totals(
            plan_i64=np.array(self._plan_counts, np.int64).tobytes(),
            plan_seconds=self._plan_seconds,
            step_i64=np.array(self._step_counts, np.int64).tobytes(),
            tokens_i64=self._tokens_D.tobytes(),
            last_tokens_i64=np.asarray(self._last_D, np.int64).tobytes(),
            rows=self._rows,
            dispatch_rows=self._dispatch_rows,
            overlap=self._overlap,
            overlapped=self._overlapped,
            moved_bytes=self._moved,
            busy_f64=self._busy_W.tobytes(),
            waited_f64=self._waited_W.tobytes(),
            phases_f64=self._phases_WP.tobytes(),
            load_i64=self._load_LW.tobytes(),
            balancedness_f64=balanced_L.tobytes(),
        )


def _num_experts(moves: Transfer) -> int:
    """Experts that travel."""
    return int((np.frombuffer(moves.moves_i32, np.int32).reshape(-1, 5)[:, 1] >= 0).sum())
