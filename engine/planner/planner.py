"""The planner of one group: events in, plans and messages out.

It has no sockets, no clock of its own and no torch, and nothing in it depends on hash order, so
that the same events give the same plans: in tests, in simulation, and when a recorded incident is
replayed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...parallel.mesh import Mesh
from ..protocol.bulk import Preload, Preloaded, Unload
from ..protocol.frontends import Abort, Rejected, Submit
from ..protocol.message import Finish, Message
from ..protocol.results import Refused, StepResult
from ..protocol.specs import SchedulerSpec
from .admission import Admission
from .group import Group
from .group_plan import Plan
from .ledger import Ledger
from .outbox import Outbox
from .request import Request, State
from .step_builder import StepBuilder


class Planner:
    """Plans every step for every rank of a group.

    The owner feeds it (``submit``, ``abort``, ``results``, ...), asks for a plan whenever
    ``wants_plan``, and calls ``tidy`` when the plan is out: what is slow and not urgent (admission,
    hashing of outputs) happens there, off the critical path.
    """

    def __init__(
        self, mesh: Mesh, spec: SchedulerSpec, num_pages: list[int], page_size: int, max_len: int
    ) -> None:
        self.group = Group(mesh, spec, num_pages, page_size, max_len)
        self.outbox = Outbox()
        self._admission = Admission(self.group)
        self._ledger = Ledger(self.group, self.outbox)
        self._builder = StepBuilder(self.group)
        self._arrivals = 0

    # ----------------------------------------------------------------- requests

    def submit(self, frontend: int, submit: Submit) -> None:
        """Queues a request, or rejects it at once. Submitting an open one again changes nothing.

        The queue is full when ``max_queue`` requests wait beside those for which there is a free
        row.
        """
        group = self.group
        if (frontend, submit.handle) in group.open:
            return
        if submit.limit > group.max_len:
            reason = f"prompt and output together are {submit.limit} tokens, the limit is {group.max_len}"
            self.outbox.reject(frontend, Rejected(submit.handle, 400, reason))
        elif self._queue_is_full():
            reason = f"The queue is full: {group.spec.max_queue} requests may wait (scheduler.max_queue)"
            self.outbox.reject(
                frontend, Rejected(submit.handle, 503, reason, retry_after=self._retry_after())
            )
        else:
            request = Request.from_submit(frontend, self._arrivals, submit)
            self._arrivals += 1
            group.open[frontend, submit.handle] = request
            group.queue.add(request)
            group.counters.prompt_tokens += request.num_prompt

    def abort(self, frontend: int, abort: Abort) -> None:
        """Frees a request; its end is acknowledged by an entry with ``Finish.ABORT`` unless it has
        ended already.
        """
        request = self.group.open.get((frontend, abort.handle))
        if request is not None:
            self._ledger.cancel(request)

    def abort_frontend(self, frontend: int) -> None:
        """Aborts everything a vanished frontend had open."""
        for key in [key for key in self.group.open if key[0] == frontend]:
            self._ledger.cancel(self.group.open[key])

    def hold(self, frontend: int, handle: int, *, held: bool) -> None:
        """Lets a running request sit out until it is resumed."""
        request = self.group.open.get((frontend, handle))
        if request is not None and request.row >= 0:
            self.group.rows.held[request.row] = held
            self.group.holding[request.row] = None

    # ----------------------------------------------------------------- ranks

    def staged(self, message: Preloaded) -> None:
        """A rank has a prompt; when all members of its data index have it, it can be admitted."""
        request = self.group.by_staged.get(message.staged)
        if request is None:
            return
        if message.error:  # a grammar that the frontend's check let through
            self._ledger.cancel(request, Finish.ERROR)
            return
        request.unacknowledged.discard(message.rank)
        row = request.row
        if not request.unacknowledged and self.group.rows.state[row] == State.PRELOADING:
            self.group.rows.state[row] = State.READY
            self.group.prefilling[self.group.rows.data(row)].append(row)

    def results(self, results: Sequence[StepResult]) -> None:
        """Books results of ranks, in the order they came in."""
        for data in sorted(self._ledger.book(list(results))):
            self.resync(data)

    def refused(self, message: Refused) -> None:
        """A rank has lost the chain: the group starts a new epoch from what is acknowledged."""
        if message.epoch == self.group.epoch:
            self.begin_epoch()

    def resync(self, data: int) -> None:
        """Sets a data index back to what it has acknowledged: its next section clears it, its
        requests are admitted anew.

        Their tokens are kept, and so are their pages as far as they are hashed, so that a replay
        computes little.
        """
        group, rows = self.group, self.group.rows
        executed = group.executed(data)
        group.rebasing[data] = True
        group.staged_from[data] = group.next_staged
        mine = rows.of_data(data)
        rows.low[mine] -= group.planned_after(group.acknowledged[group.mesh.reporter(data)])[
            mine
        ]  # those plans never were
        rows.on_rank[mine] = False
        group.assume_executed(data)
        group.freeing = [row for row in group.freeing if row not in mine]
        group.drained = [row for row in group.drained if row not in mine]
        group.draining = [(row, last) for row, last in group.draining if row not in mine]
        group.prefilling[data].clear()
        self._forget(data, executed)
        for row in mine:
            state = rows.state[row]
            if state in (State.PRELOADING, State.READY):
                group.queue.put_back(group.unreserve(row))
            elif state != State.FREE:
                group.drained.append(row)
        if group.rebasing[group.alive].all():
            group.flights.clear()
            group.newest_result = group.next_step - 1
        self._ledger.settle()

    def begin_epoch(self, *, gone: Sequence[int] = (), emptied: Sequence[int] = ()) -> None:
        """Starts a new epoch: plans in flight are void, every data index is rebased.

        Data indices ``gone`` leave for good; those ``emptied`` have a new rank among their members,
        which holds no page.
        """
        group = self.group
        group.epoch += 1
        for data in range(group.num_data):
            if group.alive[data]:
                self.resync(data)
        group.restarting = True
        group.alive[list(gone)] = False
        for data in (*gone, *emptied):
            self._forget(data, -1)

    def _forget(self, data: int, last_step: int) -> None:
        """Blocks of ``data`` planned after ``last_step`` may not have been written: nobody may find
        them, no rank be told of them.
        """
        group = self.group
        group.kv.forget_unwritten(data, last_step)
        kept = []
        for owners, keys, pages in group.publishing:
            still = (owners != data) | group.kv.index.names(owners, keys, pages)
            kept.append((owners[still], keys[still], pages[still]))
        group.publishing = kept

    # ----------------------------------------------------------------- steps

    @property
    def wants_plan(self) -> bool:
        """Whether another plan may be sent now, as far as the depth of the group goes."""
        return self.group.in_flight < self.group.mesh.depth

    def plan(self) -> Plan | None:
        """The next plan, or None when there is no work or too much in flight."""
        if not self.wants_plan:
            return None
        plan = self._builder.build()
        if plan is not None:
            self._announce_started(plan)
        return plan

    def tidy(self) -> None:
        """Settles rows that have drained and reserves places for waiting requests."""
        self._ledger.settle()
        self._admission.reserve()

    def take_staging(self) -> list[tuple[int, Preload | Unload]]:
        """Bulk messages for ranks since the last call, as (rank, message)."""
        staging, self.group.staging = self.group.staging, []
        return staging

    def take_output(self) -> list[tuple[int, Message]]:
        """Messages for frontends since the last call, as (frontend, message)."""
        return self.outbox.take(self.group.next_step - 1)

    def idle(self) -> bool:
        """Nothing runs, waits or drains."""
        group = self.group
        return not group.open and not group.draining and not group.drained and not len(group.queue)

    def fail_all(self) -> None:
        """Ends every open request with an error, and says so at once: the ranks may never answer
        again.
        """
        for request in list(self.group.open.values()):
            self._ledger.cancel(request, Finish.ERROR)
            self._ledger.end(request, Finish.ERROR)

    def check(self) -> None:
        """Integrity of all bookkeeping (tests, and on demand). Raises AssertionError."""
        group, rows = self.group, self.group.rows
        group.kv.check()
        for row, request in enumerate(rows.requests):
            assert (request is None) == (rows.state[row] == State.FREE), (
                f"row {row}: state {rows.state[row]}, request {request}"
            )
        for data in range(group.num_data):
            mine = rows.of_data(data)
            pages = np.unique(np.concatenate([rows.pages[row, : rows.num_pages[row]] for row in mine]))
            assert len(pages) == group.kv.used()[data], (
                f"data {data}: rows hold {len(pages)} pages, {group.kv.used()[data]} referenced"
            )

    def _announce_started(self, plan: Plan) -> None:
        rows = self.group.rows
        for data, section in plan.sections.items():
            for admit in section.admit:
                request = rows.request(rows.row(data, admit.slot))
                if not request.started:
                    request.started = True
                    self.outbox.started.setdefault(request.frontend, []).append(
                        (request.handle, admit.num_cached)
                    )

    def _queue_is_full(self) -> bool:
        group, waiting = self.group, len(self.group.queue)
        return waiting >= group.spec.max_queue and waiting >= group.spec.max_queue + group.num_free_rows()

    def _retry_after(self) -> float:
        """Seconds until the queue has probably moved on: its prompt tokens at the fitted rate, at
        least one.
        """
        group = self.group
        tokens = sum(request.num_staged for request in group.queue)
        return max(1.0, group.cost.cost.token * tokens / max(1, int(group.alive.sum())))
