"""What the controller knows of its cluster beside the plan: phase, ranks, timings, expert load;
packed for the frontends.
"""

from __future__ import annotations

import numpy as np

from ...moe.balance.placement import EMPTY, contiguous
from ...parallel.mesh import Mesh
from ..planner.group_plan import Plan
from ..planner.planner import Planner
from ..protocol.arrays import Int64
from ..protocol.bulk import RankHello
from ..protocol.cluster_state import ClusterState, RankState
from ..protocol.results import StepResult
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


class Census:
    """Collects observations on the step thread as arrays; ``state`` packs them twice a second."""

    def __init__(self, mesh: Mesh) -> None:
        self.phase, self.reason = "starting", "ranks are loading"
        self._mesh = mesh
        self._seconds = np.zeros(mesh.world)
        self._waited = np.zeros(mesh.world)
        self._lost: set[int] = set()
        self._hung: set[int] = set()
        self._hellos: dict[int, RankHello] = {}
        self._max_len = 0
        self.plan_seconds = Recent()
        self.largest_plan = 0
        self._states = 0
        self._totals = StepTotals(mesh)
        self._reports: list[StepResult] = []
        self._expert_LE = np.zeros((0, 0), np.int64)
        self._placement_i32 = b""

    def open(self, hellos: dict[int, RankHello], max_len: int) -> None:
        """All ranks are here."""
        self._hellos, self._max_len, self.reason = hellos, max_len, ""
        first = hellos[0]
        self._expert_LE = np.zeros((first.num_layers, first.num_experts), np.int64)
        self._totals.opened(first.num_layers, first.expert_bytes)
        self._placement = (
            contiguous(first.num_layers, first.num_experts, self._mesh.world)
            if self._expert_LE.size
            else None
        )
        self._placement_i32 = b"" if self._placement is None else self._placement.ranges().tobytes()

    def host(self, rank: int) -> str:
        return self._hellos[rank].host if rank in self._hellos else "an unknown host"

    def lost(self, rank: int) -> None:
        self._lost.add(rank)
        self._hung.discard(rank)

    def hangs(self, rank: int) -> None:
        """A rank has stopped in the middle of a step: the launcher reads this and kills it."""
        self._hung.add(rank)

    @property
    def hung(self) -> set[int]:
        return self._hung

    def back(self, hello: RankHello) -> None:
        """Another process has taken a lost rank's place."""
        self._hellos[hello.rank] = hello
        self._lost.discard(hello.rank)

    @property
    def missing(self) -> set[int]:
        """Ranks that are lost and not yet replaced."""
        return self._lost

    def observe(self, results: list[StepResult]) -> None:
        """Takes timings out of results; what ranks report now and then is kept until the next state
        is packed.
        """
        self._totals.observed(results)
        for result in results:
            self._seconds[result.rank], self._waited[result.rank] = result.seconds, result.waited
            if result.expert_i64 or result.phases_f32:
                self._reports.append(result)

    def step_seconds(self) -> float:
        """Seconds of the last step on the slowest rank."""
        return float(self._seconds.max())

    def planned(self, seconds: float, largest: int, plan: Plan, tokens_D: Int64) -> None:
        """A plan left ``seconds`` after the messages that called for it were read; its largest
        message has ``largest`` bytes.
        """
        self._totals.planned(
            seconds, plan.header, tokens_D, sum(section.bucket for section in plan.sections.values())
        )
        self.plan_seconds.add(seconds)
        self.largest_plan = max(self.largest_plan, largest)

    def state(self, planner: Planner | None) -> ClusterState:
        """The state as frontends get it; before the ranks are here it is mostly zeros."""
        self._states += 1
        self._read_reports()
        if planner is None:
            return ClusterState(
                self.phase,
                self.reason,
                0,
                0,
                0,
                0,
                False,
                0,
                0,
                0.0,
                0,
                0,
                0,
                0,
                0,
                0,
                1.0,
                0.0,
                number=self._states,
            )
        group, counters = planner.group, planner.group.counters
        own = self._seconds - self._waited
        running = group.num_running()
        return ClusterState(
            phase=self.phase,
            reason=self.reason,
            epoch=group.epoch,
            step=group.next_step - 1,
            max_len=self._max_len,
            page_size=group.page_size,
            prefix_caching=group.kv.caching,
            num_running=int(running.sum()),
            num_waiting=len(group.queue),
            kv_usage=float(group.kv.used().sum() / max(1, group.kv.num_pages.sum())),
            prompt_tokens=counters.prompt_tokens,
            generation_tokens=counters.generation_tokens,
            prefix_queries=counters.prefix_queries,
            prefix_hits=counters.prefix_hits,
            preemptions=counters.preemptions,
            steps=counters.steps,
            imbalance=float(own.max() / own.mean()) if own.mean() > 0 else 1.0,
            plan_seconds=self.plan_seconds.quantile(0.5),
            expert_layers=len(self._expert_LE),
            expert_i64=self._expert_LE.tobytes(),
            ranks=tuple(self._rank(planner, rank, running) for rank in sorted(self._hellos)),
            number=self._states,
            totals=self._totals.pack(),
            placement_i32=self._placement_i32,
        )

    def _rank(
        self, planner: Planner, rank: int, running: np.ndarray[tuple[int], np.dtype[np.int64]]
    ) -> RankState:
        group, data = planner.group, planner.group.mesh.data_of_rank(rank)
        return RankState(
            rank=rank,
            host=self._hellos[rank].host,
            pid=self._hellos[rank].pid,
            state="lost" if rank in self._lost else "hung" if rank in self._hung else "serving",
            num_running=int(running[data]),
            pages_used=int(group.kv.used()[data]),
            pages_cached=int(group.kv.cached()[data]),
            pages_total=int(group.kv.num_pages[data]),
            step_seconds=float(self._seconds[rank]),
            wait_seconds=float(self._waited[rank]),
        )

    def _read_reports(self) -> None:
        reports, self._reports = self._reports, []
        for result in reports:
            self._totals.reported(result)
            if result.expert_i64 and self._placement is not None:
                self._count_experts(result)

    def _count_experts(self, result: StepResult) -> None:
        assert self._placement is not None
        counts_LS = np.frombuffer(result.expert_i64, np.int64).reshape(len(self._expert_LE), -1)
        experts_LS = self._placement.experts_LWS[:, result.rank]
        layers, slots = np.nonzero(experts_LS != EMPTY)
        self._expert_LE[layers, experts_LS[layers, slots]] = counts_LS[layers, slots]
