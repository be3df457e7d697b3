"""``overlap: auto`` beside tensor parallelism, from measured steps to what is shown of its choices:
the clock is a formula, and the planner, the ledger and the status are those that serve.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from msgspec import structs

from lockstep.engine.controller.status import ClusterStatus
from lockstep.engine.frontend.api.cluster import describe_cluster
from lockstep.engine.frontend.metrics.engine_metrics import engine_metrics
from lockstep.engine.planner.group_plan import GroupPlan
from lockstep.engine.protocol.bulk import RankHello
from lockstep.engine.protocol.plan import Header
from lockstep.engine.protocol.results import StepResult
from lockstep.parallel.mesh import Mesh
from support.engine.planner.planner_world import World

MESH = Mesh(data=2, tensor=2)
FEW, MANY = 2, 8  # rows of a data index
LAYERS, WEIGHTS, ROW = 4, 1.0, 0.5  # milliseconds of a layer: to read its weights, and for each row


def seconds(header: Header) -> tuple[float, float]:
    """A step, and its waits. Each row makes an exchange longer by 0.15 ms and a sum of the tensor
    group by 0.1. A microbatch reads all weights for half of the rows, while the other one's travel.
    """
    rows, travel = header.capacity, 0.25 * header.capacity
    if header.microbatches == 1:
        return 1e-3 * LAYERS * (WEIGHTS + ROW * rows + travel), 1e-3 * LAYERS * travel
    part = WEIGHTS + ROW * rows / 2
    layer = max(2 * part, part + travel / 2)
    return 1e-3 * LAYERS * layer, 1e-3 * LAYERS * (layer - 2 * part)


class Timed(World):
    """Ranks whose results say how long steps take; ``status`` sees all of them."""

    def __init__(self) -> None:
        super().__init__(MESH, pages=400, page_size=4, max_len=400, overlap="auto")
        hello = RankHello(0, "host", 1, 400, 4, 0, LAYERS, 4, "cpu", 16)
        self.hellos = [structs.replace(hello, rank=rank) for rank in range(MESH.world)]
        by_rank, group = dict(enumerate(self.hellos)), self.planner.group
        self.status = ClusterStatus(MESH, by_rank, group, itertools.count(1))
        self.taken: list[tuple[int, int]] = []  # capacity and microbatches of each step
        self._times: dict[int, tuple[float, float]] = {}  # of steps
        self._plan, self.planner.plan = self.planner.plan, self.timed_plan  # type: ignore[method-assign]

    def timed_plan(self) -> GroupPlan | None:
        plan = self._plan()
        if plan is not None:
            self.status.planned(0.0, 0, plan, np.zeros(MESH.data, np.int64))
            self.taken.append((plan.header.capacity, plan.header.microbatches))
            self._times[plan.header.step] = seconds(plan.header)
        return plan

    def execute(self, rank: int) -> bool:
        if not super().execute(rank):
            return False
        result = self.results[rank].pop()
        assert isinstance(result, StepResult)
        whole, waited = self._times[result.step]
        late = 0.2 * whole * (rank % 2)  # the first of each tensor group is slower: the other one waits
        timed = structs.replace(result, seconds=whole, waited=waited + late)
        self.results[rank].append(timed)
        self.status.observe([timed])
        return True

    def serve(self, rows: int) -> list[int]:
        """Serves so many rows on each data index. Returns the microbatches of their steps."""
        first = len(self.taken)
        for _ in range(rows * MESH.data):
            self.submit([5, 6, 7], 150, stop=False)
        self.run()
        return [microbatches for capacity, microbatches in self.taken[first:] if capacity == rows]


def test_auto_turns_overlap_on_where_it_wins_beside_tensor_groups_and_says_so() -> None:
    world = Timed()
    many, few = world.serve(MANY), world.serve(FEW)
    assert set(few[:12]) == {1} and 2 in few, "it is tried"
    assert set(many[-40:]) == {2} and set(few[-40:]) == {1}
    for handle, tokens in world.tokens.items():
        assert tokens == world.expected(handle), "the same tokens"

    world.status.add_up()
    state = world.status.state((hello, "serving") for hello in world.hellos)
    shown = describe_cluster(state)["overlap"]
    choices = {choice["capacity"]: choice for choice in shown["choices"]}
    assert shown["mode"] == "auto" and not shown["last_step"]
    assert choices[MANY]["microbatches"] == 2 and choices[FEW]["microbatches"] == 1
    for rows, gain in ((MANY, 6 / 7), (FEW, 3 / 2.5)):
        whole, waited = seconds(Header(0, 0, 0, 0, 0, rows))
        assert choices[rows]["ratio"] == pytest.approx(gain, rel=0.03)
        assert choices[rows]["waits"] == pytest.approx(waited / whole), "those of the slowest rank"
    assert shown["steps"] == sum(microbatches == 2 for _, microbatches in world.taken) > 100
    samples = {
        sample.name: sample.value
        for metric in engine_metrics(state, ("m", "0"))
        for sample in metric.samples
        if "overlap" in sample.name
    }
    assert samples == {"lockstep:overlap": 0, "lockstep:overlapped_steps_total": shown["steps"]}
