"""The controller's view of its cluster beside the plan: phase, timings, expert load. It is packed
for the frontends as a ``ClusterState``.

Suffixes: L MoE layers, E logical experts, S expert slots of a rank, W ranks, D data indices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate

import numpy as np

from ...moe.balance.start import placement_of
from ...parallel.mesh import Mesh
from ..planner.group import Group
from ..planner.group_plan import GroupPlan
from ..protocol.arrays import Int64
from ..protocol.bulk import RankHello
from ..protocol.cluster_state import ClusterState, OverlapChoice, RankState
from ..protocol.results import StepResult
from ..protocol.specs import Succession
from .expert_loads import ExpertLoads
from .step_totals import StepTotals


class Recent:
    """The last 512 values of a measurement."""

    def __init__(self) -> None:
        self._values = np.zeros(512)
        self._count = 0

    def add(self, value: float) -> None:
        self._values[self._count % len(self._values)] = value
        self._count += 1

    def quantile(self, share: float) -> float:
        """0 before the first value."""
        seen = self._values[: min(self._count, len(self._values))]
        return float(np.quantile(seen, share)) if len(seen) else 0.0


def gathering_state(reason: str, number: int, succession: Succession | None = None) -> ClusterState:
    """The state before all ranks are there. In a ``succession`` requests are taken, and wait."""
    phase = "starting" if succession is None else "draining" if succession.draining else "recovering"
    return ClusterState(
        phase=phase,
        reason=reason,
        epoch=0 if succession is None else succession.epoch,
        step=0,
        max_len=0 if succession is None else succession.max_len,
        page_size=0 if succession is None else succession.page_size,
        prefix_caching=succession is not None and succession.page_size > 0,
        num_running=0,
        num_waiting=0,
        kv_usage=0.0,
        prompt_tokens=0,
        generation_tokens=0,
        prefix_queries=0,
        prefix_hits=0,
        preemptions=0,
        steps=0,
        imbalance=1.0,
        plan_seconds=0.0,
        number=number,
    )


class ClusterStatus:
    """Collects observations on the step thread as arrays; ``state`` packs them twice a second.

    ``phase`` is serving | recovering | draining | drained | failed, ``reason`` explains it to
    people, ``degraded`` names what the launcher misses, ``without`` the lost ranks that the others
    serve without, ``unbalanced`` why experts no longer move. ``numbers`` gives each state its
    number.
    ``plan_seconds`` are those from reading results to handing over the plan, ``largest_plan`` is
    the most bytes that one rank was sent. ``experts`` are their loads and placement.
    """

    def __init__(
        self,
        mesh: Mesh,
        hellos: Mapping[int, RankHello],
        group: Group,
        numbers: Iterator[int],
        placement_i32: bytes = b"",
    ) -> None:
        self.phase, self.reason = "serving", ""
        self.degraded = self.without = self.unbalanced = ""
        self.plan_seconds = Recent()
        self.largest_plan = 0
        self._group, self._numbers = group, numbers
        self._seconds_W = np.zeros(mesh.world)
        self._waited_W = np.zeros(mesh.world)
        self._mesh, hello = mesh, hellos[0]
        ends = list(accumulate(hellos[mesh.rank(stage, 0, 0)].num_layers for stage in range(mesh.pipeline)))
        num_layers = ends[-1]
        # The MoE layers of each stage.
        self._layers = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
        placement = placement_of(placement_i32, num_layers, hello.num_experts, mesh.experts)
        self.experts = ExpertLoads(mesh, self._layers, placement)
        self._totals = StepTotals(mesh, self._layers, hello.expert_bytes)
        self._observed: list[StepResult] = []
        self._reports: list[StepResult] = []
        self._transports = [""] * mesh.world
        self._shown, self._shown_i32 = placement, placement.ranges().tobytes()

    def observe(self, results: list[StepResult]) -> None:
        """Takes in timings, on the way to a plan. The rest waits for ``add_up``."""
        ranks = [result.rank for result in results]
        self._seconds_W[ranks] = [result.seconds for result in results]
        self._waited_W[ranks] = [result.waited for result in results]
        self._observed += results

    def add_up(self) -> None:
        """Adds the results observed since the last call to the totals, once the plan is out.
        Counts, which ranks add now and then, wait for the next state.
        """
        if not self._observed:
            return
        results, self._observed = self._observed, []
        self._totals.observed(results)
        self._reports += [
            result for result in results if result.expert_i64 or result.phases_f32 or result.transports
        ]

    def step_seconds(self) -> float:
        """Seconds of the last step on the slowest rank."""
        return float(self._seconds_W.max())

    def planned(self, seconds: float, largest: int, plan: GroupPlan, tokens_D: Int64) -> None:
        """A plan was sent ``seconds`` after its turn began; one rank got ``largest`` bytes, others
        less.
        """
        rows = sum(section.bucket for section in plan.sections.values())
        self._totals.planned(seconds, plan.header, tokens_D, rows)
        self.plan_seconds.add(seconds)
        self.largest_plan = max(self.largest_plan, largest)

    def state(self, ranks: Iterable[tuple[RankHello, str]]) -> ClusterState:
        """The state for frontends, with each rank's hello and condition."""
        self._read_reports()
        group, counters = self._group, self._group.counters
        own_W = self._seconds_W - self._waited_W
        running_D = group.num_running()
        return ClusterState(
            phase=self.phase,
            reason=self.reason,
            epoch=group.steps.epoch,
            step=group.steps.last_step,
            max_len=group.max_len,
            page_size=group.page_size,
            prefix_caching=group.kv.caching,
            num_running=int(running_D.sum()),
            num_waiting=len(group.queue),
            kv_usage=float(group.kv.used().sum() / max(1, group.kv.num_pages.sum())),
            prompt_tokens=counters.prompt_tokens,
            generation_tokens=counters.generation_tokens,
            prefix_queries=counters.prefix_queries,
            prefix_hits=counters.prefix_hits,
            preemptions=counters.preemptions,
            steps=counters.steps,
            imbalance=float(own_W.max() / own_W.mean()) if own_W.mean() > 0 else 1.0,
            plan_seconds=self.plan_seconds.quantile(0.5),
            expert_layers=len(self.experts.loads_LE),
            expert_i64=self.experts.loads_LE.tobytes(),
            ranks=tuple(self._rank(hello, condition, running_D) for hello, condition in ranks),
            number=next(self._numbers),
            totals=self._totals.pack(),
            placement_i32=self._placement_ranges(),
            placement_version=group.moves.committed,
            moves_open=group.moves.num_open,
            degraded="; ".join(filter(None, (self.without, self.degraded, self.unbalanced))),
            overlap=group.overlap.mode,
            overlap_choices=tuple(
                OverlapChoice(capacity, choice.microbatches, choice.waits, choice.ratio)
                for capacity, choice in sorted(group.overlap.choices.items())
            ),
            num_deferred=min(group.num_deferred, len(group.queue)),
        )

    def _rank(self, hello: RankHello, condition: str, running_D: Int64) -> RankState:
        group = self._group
        data = group.mesh.data_of_rank(hello.rank)
        return RankState(
            rank=hello.rank,
            host=hello.host,
            pid=hello.pid,
            state=condition,
            num_running=int(running_D[data]),
            pages_used=int(group.kv.used()[data]),
            pages_cached=int(group.kv.cached()[data]),
            pages_total=int(group.kv.num_pages[data]),
            step_seconds=float(self._seconds_W[hello.rank]),
            wait_seconds=float(self._waited_W[hello.rank]),
            recovery=hello.recovery,
            transports=self._transports[hello.rank],
        )

    def _read_reports(self) -> None:
        reports, self._reports = self._reports, []
        for result in reports:
            self._totals.reported(result)
            self._transports[result.rank] = result.transports or self._transports[result.rank]
        self.experts.take([result for result in reports if result.expert_i64])

    def _placement_ranges(self) -> bytes:
        """``Placement.ranges`` of the newest placement, which seldom changes."""
        if self._shown is not self.experts.newest:
            self._shown = self.experts.newest
            self._shown_i32 = self._shown.ranges().tobytes()
        return self._shown_i32
