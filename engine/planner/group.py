"""The state of one group as its planner holds it: rows, pages, queue, and the plans in flight."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...parallel.mesh import Mesh
from ..kv.manager import KVManager
from ..protocol.arrays import Int64, UInt64
from ..protocol.bulk import Preload, Unload
from ..protocol.specs import SchedulerSpec
from .cost_model import CostModel
from .flight import Flight
from .queue import WaitingQueue
from .request import Request, State
from .rows import RowTable
from .token_log import TokenLog


@dataclass
class PlannerCounters:
    """Totals since the controller started."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    steps: int = 0


class Group:
    """State shared by admission, step building and the ledger of results; it has no behaviour
    beyond bookkeeping.
    """

    def __init__(
        self, mesh: Mesh, spec: SchedulerSpec, num_pages: list[int], page_size: int, max_len: int
    ) -> None:
        self.mesh, self.spec, self.max_len = mesh, spec, max_len
        self.num_data = mesh.data
        max_row_pages = -(-max_len // page_size)
        self.rows = RowTable(mesh.data, spec.max_running, max_row_pages, mesh.num_cohorts)
        self.kv = KVManager(num_pages, page_size, caching=spec.prefix_caching)
        self.log = TokenLog(mesh.data * spec.max_running)
        self.cost = CostModel()
        self.queue = WaitingQueue()
        self.open: dict[tuple[int, int], Request] = {}
        self.counters = PlannerCounters()

        self.epoch = 0
        self.next_step = 0
        self.next_cohort = 0
        self.newest_result = -1
        self.acknowledged = [-1] * mesh.world
        self.flights: dict[int, Flight] = {}
        self.alive = np.ones(mesh.data, np.bool_)
        self.rebasing = np.ones(mesh.data, np.bool_)
        self.staged_from = [0] * mesh.data
        self.restarting = True

        self.prefilling: list[list[int]] = [[] for _ in range(mesh.data)]
        self.freeing: list[int] = []
        self.holding: dict[int, None] = {}  # rows whose ``held`` their rank has yet to hear of, in order
        self.draining: list[tuple[int, int]] = []  # (row, the last step whose result counts)
        self.drained: list[int] = []
        self.publishing: list[tuple[Int64, UInt64, Int64]] = []
        self.staging: list[tuple[int, Preload | Unload]] = []
        self.by_staged: dict[int, Request] = {}
        self.next_staged = 0

    @property
    def page_size(self) -> int:
        return self.kv.page_size

    @property
    def in_flight(self) -> int:
        """Plans of which no result has come in."""
        return self.next_step - 1 - self.newest_result

    def executed(self, data: int) -> int:
        """The last step that all members of ``data`` have acknowledged."""
        return min(self.acknowledged[rank] for rank in self.mesh.members(data))

    def assume_executed(self, data: int) -> None:
        """Results of ``data`` for plans sent so far no longer count."""
        for rank in self.mesh.members(data):
            self.acknowledged[rank] = self.next_step - 1

    def planned_after(self, step: int) -> Int64:
        """How many plans after ``step`` let each row decode [rows], of those not yet acknowledged
        by all ranks.
        """
        later = [flight.rows[flight.decode] for flight in self.flights.values() if flight.step > step]
        return (
            np.bincount(np.concatenate(later), minlength=len(self.rows.state))
            if later
            else np.zeros(len(self.rows.state), np.int64)
        )

    def retire(self, row: int, last_step: int) -> None:
        """Takes a row out of all plans after ``last_step``: the next one frees its slot, results up
        to ``last_step`` still count.
        """
        self.rows.state[row] = State.DRAINING
        self.freeing.append(row)
        self.draining.append((row, last_step))

    def unreserve(self, row: int) -> Request:
        """Takes back a row that no plan has named yet, with its pages and its staged prompt."""
        request = self.rows.request(row)
        self.give_back_pages(row)
        self.staging.extend((rank, Unload(request.staged)) for rank in self.mesh.members(self.rows.data(row)))
        self.by_staged.pop(request.staged, None)
        prefilling = self.prefilling[self.rows.data(row)]
        if row in prefilling:
            prefilling.remove(row)
        self.rows.vacate([row])
        return request

    def give_back_pages(self, row: int) -> None:
        self.kv.release(np.array([self.rows.data(row)]), *self.rows.take_pages(np.array([row])))

    def predicted_seconds(self) -> float:
        """Predicted seconds of the slowest section in flight; 0 when nothing is."""
        flights = self.flights.values()
        return max(
            (
                self.cost.seconds(float(f.tokens.max()), float(f.kv.max()), float(f.context.max()))
                for f in flights
            ),
            default=0.0,
        )

    def num_free_rows(self) -> int:
        """Rows that waiting requests can have at once, pages permitting."""
        return sum(
            self.rows.num_slots - self.rows.num_used[data] for data in np.flatnonzero(self.alive).tolist()
        )

    def num_running(self) -> Int64:
        """Rows in use [D]."""
        return np.array(self.rows.num_used)
