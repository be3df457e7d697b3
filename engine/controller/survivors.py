"""Goes on without lost ranks, once the others have their experts."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import numpy as np

from ...moe.balance.cover import cover
from ...parallel.recovery import PROCESS_RESTART
from ..protocol.bulk import RankHello, SetPlacement
from ..protocol.specs import ControllerSpec
from .expert_loads import ExpertLoads
from .pilot import Pilot

log = logging.getLogger(__name__)


class Survivors:
    """Gives the experts that only lost ranks had to others, which load them from the checkpoint
    into slots of replicas.

    ``absent`` are the data indices without which the present epoch runs. ``loading`` are ranks that
    have yet to say hello with the newest placement. Every rank waits for a replacement where
    ``cluster.survivors`` says so, where a process cannot join a second epoch, or where data indices
    share dense blocks.
    """

    def __init__(
        self, spec: ControllerSpec, hellos: Mapping[int, RankHello], loads: ExpertLoads, pilot: Pilot
    ) -> None:
        self.absent: tuple[int, ...] = ()
        self.loading: set[int] = set()
        self._mesh, self._loads, self._pilot = spec.mesh, loads, pilot
        self._may = spec.survivors and not spec.mesh.shares_dense
        self._may = self._may and all(hello.recovery != PROCESS_RESTART for hello in hellos.values())
        self._orders: list[tuple[int, SetPlacement]] = []

    def prepare(self, lost: set[int]) -> bool:
        """Whether the group can run without the data indices of ``lost`` ranks, once no rank is
        ``loading``. For the time between epochs, when no moves are open.
        """
        self.loading -= lost
        absent = self._data_of(lost)
        if set(absent) <= set(self.absent):
            return True
        if not self._may or len(absent) == self._mesh.data:
            return False
        before = self._loads.newest
        try:
            loads_LE = self._loads.loads_LE.astype(np.float64)
            after = cover(before, loads_LE, self._loads.layers, self._mesh.positions(absent))
        except ValueError as error:
            log.warning("the group cannot go on without ranks %s: %s", sorted(lost), error)
            return False
        self._loads.place(self._pilot.group.steps.next_step, after)
        num = int((before.experts_LWS != after.experts_LWS).sum())
        if num:
            self._pilot.place_experts(self._pilot.group.moves.committed + 1)
            self.loading = set(range(self._mesh.world)) - lost
            self._orders = [(rank, self.place) for rank in sorted(self.loading)]
        log.info("%d experts, counted by layer, are loaded again in place of replicas", num)
        return True

    @property
    def place(self) -> SetPlacement:
        """The placement, for a rank that has another."""
        return SetPlacement(self._pilot.group.moves.committed, self._loads.newest.experts_LWS.tobytes())

    def is_behind(self, hello: RankHello) -> bool:
        """Whether a rank, which runs nothing, has another placement."""
        return hello.placement_version != self._pilot.group.moves.committed

    def loaded(self, hello: RankHello) -> None:
        """A rank in ``loading`` says hello. One whose connection was away is told again."""
        if self.is_behind(hello):
            self._orders.append((hello.rank, self.place))
        else:
            self.loading.discard(hello.rank)

    def go_on(self, lost: set[int]) -> bool:
        """Sets ``absent``, all being ``prepare``d. Returns whether that is a change."""
        before, self.absent = self.absent, self._data_of(lost)
        return self.absent != before

    def take_orders(self) -> list[tuple[int, SetPlacement]]:
        """Messages for ranks since the last call, as (rank, message)."""
        orders, self._orders = self._orders, []
        return orders

    def _data_of(self, ranks: Iterable[int]) -> tuple[int, ...]:
        return tuple(sorted({self._mesh.data_of_rank(rank) for rank in ranks}))
