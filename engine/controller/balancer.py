"""Balances experts while the cluster serves: reports of loads in, moves out.

A thread searches, so that no plan waits for it. Its moves become events of the planner, which
starts and commits them; only then does the placement change.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from ...moe.balance.balance import Balanced, Limits, balance, weighted_imbalance
from ...moe.balance.layers import Floats
from ...moe.balance.loads import LoadWindow, Trigger
from ...moe.balance.placement import EMPTY, Placement
from ...moe.balance.travel import experts_at_once
from ...parallel.mesh import Mesh
from ..planner.group_plan import GroupPlan
from ..protocol.arrays import Int32, Int64
from ..protocol.bulk import RankHello
from ..protocol.plan import Transfer
from .expert_loads import ExpertLoads
from .pilot import Pilot

log = logging.getLogger(__name__)

_REPORTS = 2
"""Reports in the window, if they hold tokens enough: as far back as loads are looked at."""

_TARGET = 1.02
"""Maximum / mean load at which a layer is left alone, as a multiple of the least there can be."""


class Balancer:
    """Moves experts where ``enabled``. ``stopped`` says why it no longer does; empty while it
    does, or was never meant to.
    """

    def __init__(
        self, mesh: Mesh, hellos: Mapping[int, RankHello], loads: ExpertLoads, pilot: Pilot, *, enabled: bool
    ) -> None:
        self._mesh, self._loads, self._pilot = mesh, loads, pilot
        self._expert_bytes = max(1, hellos[0].expert_bytes)
        hosts = sorted({hello.host for hello in hellos.values()})
        self._node = {rank: hosts.index(hello.host) for rank, hello in hellos.items()}
        self._trigger = Trigger()
        least = self._trigger.least_tokens(mesh.experts)
        self._window = LoadWindow(*loads.loads_LE.shape, _REPORTS, least)
        self._reached = 1.0  # imbalance that the last search aimed at, with its loads
        self._seen = 0
        self._open: dict[int, Transfer] = {}
        self._newest = pilot.group.moves.committed  # id
        self._search: Future[tuple[list[Balanced], float]] | None = None
        self._searched = loads.newest
        movable = enabled and mesh.experts > 1 and loads.loads_LE.size
        self._thread = ThreadPoolExecutor(1, "balancer") if movable else None
        self.stopped = ""
        self._form = next((hello.expert_form for hello in hellos.values() if hello.expert_form), "")
        for hello in hellos.values():
            self.joined(hello)

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
            self._thread = None

    def joined(self, hello: RankHello) -> None:
        """A rank is here. On a CPU of another kind it may hold experts in another form; it has none
        where its stage has no experts.
        """
        if hello.expert_form not in ("", self._form):
            forms = f"rank {hello.rank} on {hello.host} holds {hello.expert_form}, others {self._form}"
            self._stop(f"experts no longer move, they differ in form: {forms}")

    def _stop(self, reason: str) -> None:
        if self._thread is not None:
            self.close()
            self.stopped = reason
            log.error("%s", reason)

    def planned(self, plan: GroupPlan) -> None:
        """A plan was sent; it may commit moves."""
        committed = [self._open.pop(number) for number in plan.header.commits if number in self._open]
        if not committed:
            return
        experts_LWS = self._loads.newest.experts_LWS.copy()
        for moves in committed:
            layers, experts, _, ranks, slots = _rows(moves).T
            experts_LWS[layers, ranks, slots] = experts
        placement = Placement(experts_LWS, self._loads.newest.num_experts)
        self._loads.place(plan.header.step, placement)
        num = sum(len(_rows(moves)) for moves in committed)
        log.info(
            "step %d commits %d moves of experts, to imbalance %.3f", plan.header.step, num, self._reached
        )

    def look(self) -> None:
        """Takes in a complete report, starts a search when loads have drifted, and hands its moves
        to the planner.
        """
        if self._thread is None:
            return
        if self._loads.num_complete > self._seen:
            self._seen = self._loads.num_complete
            self._window.add(self._loads.loads_LE)
            self._start_search()
        elif self._search is not None and self._search.done():
            search, self._search = self._search, None
            if error := search.exception():
                self._stop(f"experts no longer move: {type(error).__name__}: {error}")
                return
            found, reached = search.result()
            if self._may_move() and self._searched is self._loads.newest:
                self._reached = reached
                self._offer(found)

    def _may_move(self) -> bool:
        """Moves follow one another, and need every rank."""
        group = self._pilot.group
        return not group.moves.num_open and not group.steps.vacant

    def _start_search(self) -> None:
        loads_LE, placement = self._window.loads_LE, self._loads.newest
        idle = self._search is None and self._may_move()
        if self._thread is None or not idle or not self._trigger.due(loads_LE, placement, self._reached):
            return
        nodes = [
            tuple(self._node[rank] for rank in self._mesh.stage_ranks(stage))
            for stage in range(self._mesh.pipeline)
        ]
        self._searched = placement
        self._search = self._thread.submit(_balance_stages, loads_LE, placement, self._loads.layers, nodes)

    def _offer(self, found: Sequence[Balanced]) -> None:
        """Cuts moves into parts that travel together, by whole layers."""
        self._newest = max(self._newest, self._pilot.group.moves.committed)
        most = experts_at_once(self._expert_bytes)
        moves: list[Transfer] = []
        for stage, (layers, balanced) in enumerate(zip(self._loads.layers, found, strict=True)):
            before_LWS = self._loads.newest.experts_LWS[layers]
            parts: list[list[Int32]] = []
            carried_2W = np.zeros((2, self._mesh.experts), np.int64)
            for rows_N5 in _by_layer(before_LWS, balanced, layers.start):
                own_2W = self._carried(rows_N5)
                if not parts or (carried_2W + own_2W).max() > most:
                    parts.append([])
                    carried_2W[:] = 0
                parts[-1].append(rows_N5)
                carried_2W += own_2W
            for part in parts:
                self._newest += 1
                moves.append(Transfer(self._newest, stage, np.concatenate(part).tobytes()))
        self._open = {part.id: part for part in moves}
        if not moves:
            return
        log.info(
            "%d moves of experts begin, in %d parts", sum(len(_rows(part)) for part in moves), len(moves)
        )
        self._pilot.move_experts(moves)

    def _carried(self, rows_N5: Int32) -> Int64:
        """Experts that each rank sends, and receives."""
        travelling_N5 = rows_N5[rows_N5[:, 1] != EMPTY]
        return np.stack([np.bincount(travelling_N5[:, end], minlength=self._mesh.experts) for end in (2, 3)])


def _balance_stages(
    loads_LE: Floats, placement: Placement, layers: Sequence[slice], nodes: Sequence[tuple[int, ...]]
) -> tuple[list[Balanced], float]:
    """Balances each stage's layers over its ranks. Returns that, and the ``weighted_imbalance`` of
    all layers then.
    """
    found = [
        balance(
            loads_LE[mine],
            Placement(placement.experts_LWS[mine], placement.num_experts),
            Limits(node_W=node_W, target=_TARGET),
        )
        for mine, node_W in zip(layers, nodes, strict=True)
    ]
    experts_LWS = np.concatenate([balanced.placement.experts_LWS for balanced in found])
    return found, weighted_imbalance(loads_LE, Placement(experts_LWS, placement.num_experts))


def _by_layer(before_LWS: Int32, balanced: Balanced, first: int) -> list[Int32]:
    """Rows as in ``Transfer.moves_i32`` for each layer that changes, emptied slots too."""
    after_LWS, moves = balanced.placement.experts_LWS, balanced.moves
    sources_LWS = np.full(after_LWS.shape, EMPTY)
    sources_LWS[moves.layers, moves.ranks, moves.slots] = moves.sources
    found = []
    for layer in (before_LWS != after_LWS).any(axis=(1, 2)).nonzero()[0]:
        ranks, slots = (before_LWS[layer] != after_LWS[layer]).nonzero()
        columns = (
            np.full(len(ranks), first + layer),
            after_LWS[layer, ranks, slots],
            sources_LWS[layer, ranks, slots],
            ranks,
            slots,
        )
        found.append(np.stack(columns, axis=1).astype(np.int32))
    return found


def _rows(moves: Transfer) -> Int32:
    return np.frombuffer(moves.moves_i32, np.int32).reshape(-1, 5)
