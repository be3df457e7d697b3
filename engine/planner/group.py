"""The state of one group as its planner holds it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..kv.budget import pages_for
from ..kv.manager import KVManager
from ..protocol.arrays import Int64
from .cost_model import CostModel
from .draining import Draining
from .expert_moves import ExpertMoves
from .index_changes import IndexChanges
from .overlap import Overlap
from .prefill_queues import PrefillQueues
from .preloads import Preloads
from .publishing import Publishing
from .queue import WaitingQueue
from .request import Request, State
from .rows import RowTable
from .settings import Settings
from .step_sequence import StepSequence
from .token_log import TokenLog
from .trials import Trials


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
    """State shared by admission, step building and the ledger of results.

    Each part keeps its own invariants; the methods here are the transitions that touch several.
    ``open`` has every request that has not ended, by (frontend, handle). ``num_deferred`` requests
    stepped aside in the last round of admission, for a block that is being computed. ``changes`` of
    the block index: None unless a router mirrors it.
    """

    def __init__(self, settings: Settings) -> None:
        mesh, spec = settings.mesh, settings.spec
        self.index = settings.group
        self.mesh = mesh
        self.spec = spec
        self.max_len = settings.max_len
        self.page_size = settings.page_size
        self.changes = IndexChanges(settings.page_size) if settings.tell_changes else None
        self.kv = KVManager(
            settings.num_pages,
            settings.page_size,
            caching=spec.prefix_caching,
            removed=None if self.changes is None else self.changes.removed,
        )
        max_pages = pages_for(settings.max_len, settings.page_size)
        self.rows = RowTable(mesh.data, spec.max_running, max_pages, mesh.num_cohorts)
        self.log = TokenLog(mesh.data * spec.max_running)
        self.cost = CostModel(early=spec.step_time_limit > 0)
        self.overlap = Overlap(spec.overlap, exchanges=mesh.experts > 1)
        self.open: dict[tuple[int, int], Request] = {}
        self.queue = WaitingQueue()
        self.prefilling = PrefillQueues(self.rows)
        self.preloads = Preloads(mesh, settings.epoch)
        self.steps = StepSequence(mesh, settings.epoch)
        self.draining = Draining(self.rows, self.steps)
        self.publishing = Publishing(self.kv.index)
        self.trials = Trials(self.num_tokens)
        self.moves = ExpertMoves(mesh, settings.placement_version)
        self.counters = PlannerCounters()
        self.num_deferred = 0

    # ----------------------------------------------------------------- questions

    def num_running(self) -> Int64:
        """Rows in use [D]."""
        return np.array(self.rows.num_used)

    def num_tokens(self, request: Request) -> int:
        """Output tokens of ``request`` so far."""
        return request.num_emitted + (int(self.log.count[request.row]) if request.row >= 0 else 0)

    def unfinished(self, data: int) -> list[Request]:
        """Requests in steps that some member of ``data`` has not acknowledged."""
        rows, executed = self.rows, self.steps.executed(data)
        named = [
            part
            for flight in self.steps.flights.values()
            if flight.step > executed
            for part in (flight.rows[flight.span(data)], flight.prompts[rows.data(flight.prompts) == data])
        ]
        if not named:
            return []
        # A row may have drained, or be another request's, once the ranks that sample have answered.
        running = [
            row for row in np.unique(np.concatenate(named)).tolist() if rows.state[row] >= State.PREFILL
        ]
        return [rows.request(row) for row in running if not rows.finish[row]]

    def num_free_rows(self) -> int:
        """Rows that waiting requests can have at once, pages permitting."""
        return int((self.rows.num_slots - self.num_running())[self.steps.alive].sum())

    def has_headroom(self, data: int, fresh: int) -> bool:
        """Whether ``data`` has ``fresh`` pages and one more for every running row, which may soon
        need it: admitting into the last pages only causes preemptions.
        """
        running = self.rows.num_used[data]
        return not running or self.kv.available_on(data) >= fresh + running

    def distrust_flights(self) -> None:
        """Bounds later prompt chunks until a step has been measured: those in flight may be too
        long.
        """
        tokens = max((int(flight.tokens.max()) for flight in self.steps.flights.values()), default=0)
        if tokens:
            self.cost.distrust(tokens)

    def predicted_seconds(self) -> float:
        """Predicted seconds of the slowest section in flight; 0 when nothing is."""
        flights = self.steps.flights.values()
        return max(
            (
                self.cost.seconds(float(f.tokens.max()), float(f.kv.max()), float(f.context.max()))
                for f in flights
            ),
            default=0.0,
        )

    # ----------------------------------------------------------------- requests

    def enter(self, request: Request) -> None:
        """Queues a new request until it gets a row."""
        self.open[request.frontend, request.handle] = request
        self.queue.add(request)
        self.counters.prompt_tokens += request.num_prompt

    def close(self, request: Request) -> bool:
        """Removes a request that has ended. Returns whether it was still open."""
        self.trials.ended(request)
        return self.open.pop((request.frontend, request.handle), None) is not None

    def preloaded(self, request: Request, rank: int) -> None:
        """Notes that ``rank`` has the prompt. Once all members have it, a plan can admit the
        request.
        """
        request.unacknowledged.discard(rank)
        if not request.unacknowledged and self.rows.state[request.row] == State.PRELOADING:
            self.rows.ready(request.row)
            self.prefilling.add(request.row)

    def unreserve(self, row: int) -> Request:
        """Takes back a row that no plan has named yet, with its pages and its preloaded prompt."""
        request = self.rows.request(row)
        self.give_back_pages(np.array([row]))
        self.preloads.withdraw(request, self.rows.data(row))
        self.prefilling.discard(row)
        self.rows.vacate([row])
        return request

    def leave(self, row: int) -> None:
        """Takes a row out of all further plans."""
        self.prefilling.discard(row)
        self.draining.retire(row, self.steps.last_step)

    def preempt(self, row: int) -> None:
        """Gives the pages of ``row`` to others; its request will run again."""
        self.counters.preemptions += 1
        self.rows.request(row).preemptions += 1
        if self.rows.state[row] in (State.PRELOADING, State.READY):
            self.queue.put_back(self.unreserve(row))
        else:
            self.leave(row)
            self.give_back_pages(np.array([row]))

    def give_back_pages(self, rows: Int64) -> None:
        self.kv.release(self.rows.data(rows), *self.rows.take_pages(rows))

    # ----------------------------------------------------------------- setting back

    def set_back(self, data: int) -> None:
        """Sets ``data`` back to what it has acknowledged: its next section clears it, its requests
        wait again with the tokens they have.

        Their pages stay cached as far as they are hashed, so that a replay computes little.
        """
        executed = self.steps.executed(data)
        reported = self.steps.reported(data)
        rows, steps = self.rows, self.steps
        unreported = steps.planned_after(reported, len(rows.state))
        unwritten = steps.planned_after(executed, len(rows.state)) - unreported
        rows.set_back(data, unreported, unwritten * self.spec.max_advance)
        self.steps.set_back(data)
        self.preloads.set_back(data)
        self.prefilling.clear(data)
        self.draining.set_back(data)
        self.forget_blocks(data, executed)
        for row in self.rows.of_data(data):
            if self.rows.state[row] in (State.PRELOADING, State.READY):
                self.queue.put_back(self.unreserve(row))

    def shrink(self, data: int, num_pages: int) -> list[Request]:
        """Lowers the pool size of ``data``. Returns the open requests that no longer fit."""
        self.kv.shrink(data, num_pages)
        self.max_len = min(self.max_len, num_pages * self.page_size)
        return [request for request in self.open.values() if request.limit > self.max_len]

    def forget_blocks(self, data: int, last_step: int) -> None:
        """Removes blocks of ``data`` planned after ``last_step`` from the index and from what is
        published: they may never have been written.
        """
        self.kv.forget_unwritten(data, last_step)
        self.publishing.forget(data)
