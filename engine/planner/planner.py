"""The planner of one group: events in, plans and messages out.

It has no sockets, no clock of its own and no torch, and nothing in it depends on hash order, so
that the same events give the same plans: in tests, in simulation, and when a recorded incident is
replayed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..protocol.arrays import as_keys
from ..protocol.bulk import Preload, Preloaded, Unload
from ..protocol.frontends import Abort, Rejected, Submit
from ..protocol.message import Finish, Message
from ..protocol.plan import Transfer
from ..protocol.results import Refused, StepResult
from .admission import Admission
from .group import Group
from .group_plan import GroupPlan
from .index_changes import Change
from .ledger import Ledger
from .outbox import Outbox, Start
from .request import Request, State
from .settings import Settings
from .step_builder import StepBuilder

_GUILTY = "Ranks died repeatedly while computing this request and no other; it was ended"


class Planner:
    """Plans every step for every rank of a group.

    The owner feeds it (``submit``, ``abort``, ``results``, ...), asks for a plan whenever
    ``wants_plan``, and calls ``tidy`` once the plan is out: slow work that is not urgent, such as
    admission and the hashing of outputs, happens there, off the critical path.
    """

    def __init__(self, settings: Settings) -> None:
        self.group = Group(settings)
        self.outbox = Outbox()
        self._admission = Admission(self.group)
        self._ledger = Ledger(self.group, self.outbox)
        self._builder = StepBuilder(self.group)
        self._arrivals = 0

    # ----------------------------------------------------------------- requests

    def submit(self, frontend: int, submit: Submit) -> None:
        """Queues a request, or rejects it at once. Submitting an open one again changes nothing.

        ``max_queue`` bounds the requests that wait beyond the free rows, but for those that had
        begun: their clients have tokens.
        """
        group = self.group
        if (frontend, submit.handle) in group.open:
            return
        if submit.limit > group.max_len:
            reason = f"prompt and output together are {submit.limit} tokens, the limit is {group.max_len}"
            self.outbox.reject(frontend, Rejected(submit.handle, 400, reason))
        elif submit.emitted_i32 and len(submit.prompt_i32 + submit.emitted_i32) >= 4 * submit.limit:
            self.outbox.end(frontend, submit.handle, len(submit.emitted_i32) // 4, Finish.LENGTH)
        elif self._queue_is_full() and not submit.emitted_i32:
            reason = f"The queue is full: {group.spec.max_queue} requests may wait (scheduler.max_queue)"
            rejected = Rejected(submit.handle, 503, reason, retry_after=self._retry_after())
            self.outbox.reject(frontend, rejected)
        else:
            request = Request.from_submit(frontend, self._arrivals, submit)
            if request.root:  # blocks are known before a plan computes them, or it could be lost unnoticed
                request.hash_outputs(b"", group.page_size)
            group.enter(request)
            self._arrivals += 1

    def abort(self, frontend: int, abort: Abort) -> None:
        """Frees a request. An entry with ``Finish.ABORT`` acknowledges its end, unless it has ended
        already.
        """
        request = self.group.open.get((frontend, abort.handle))
        if request is not None:
            self._ledger.cancel(request)

    def abort_frontend(self, frontend: int) -> None:
        """Aborts all requests of a frontend that has vanished."""
        for key in [key for key in self.group.open if key[0] == frontend]:
            self._ledger.cancel(self.group.open[key])

    def hold(self, frontend: int, handle: int, *, held: bool) -> None:
        """Pauses a running request until it is resumed."""
        request = self.group.open.get((frontend, handle))
        if request is not None and request.row >= 0:
            self.group.rows.hold(request.row, held=held)

    def fail_all(self) -> None:
        """Ends every open request with an error and reports it at once: ranks may never answer
        again.
        """
        for request in list(self.group.open.values()):
            self._ledger.cancel(request, Finish.ERROR)
            self._ledger.end(request, Finish.ERROR)

    # ----------------------------------------------------------------- ranks

    def staged(self, message: Preloaded) -> None:
        """Handles a rank's receipt of a prompt. A grammar that the rank cannot compile ends the
        request.
        """
        request = self.group.preloads.waiting_for(message)
        if request is None:
            return
        if message.error:
            self._ledger.fail(request, f"Structured output: {message.error}")
        else:
            self.group.preloaded(request, message.rank)

    def results(self, results: Sequence[StepResult]) -> None:
        """Books results of ranks, in the order they came in."""
        for data in sorted(self._ledger.book(list(results))):
            self.resync(data)

    def refused(self, message: Refused) -> None:
        """Handles a rank's refusal of a plan: starts a new epoch from what is acknowledged."""
        if message.epoch == self.group.steps.epoch:
            self.begin_epoch(absent=self.group.steps.absent())

    def resync(self, data: int) -> None:
        """Sets a data index back to what it has acknowledged: its next section clears it, its
        requests are admitted anew.
        """
        self.group.set_back(data)
        self._ledger.settle()

    def begin_epoch(self, *, absent: Sequence[int] = (), emptied: Sequence[int] = ()) -> None:
        """Starts a new epoch: plans in flight are void, every data index is rebased.

        Data indices ``absent`` take no part in it, and hold no page when they come back; those
        ``emptied`` have a new rank among their members, which holds none.
        """
        steps = self.group.steps
        for data in emptied:
            guilty = self.group.trials.died(self.group.unfinished(data))
            if guilty is not None:
                self._ledger.fail(guilty, _GUILTY)
        self.group.distrust_flights()
        steps.begin_epoch()
        self.group.moves.begin_epoch()
        for data in steps.living():
            self.resync(data)
        steps.attend(absent)
        for data in (*absent, *emptied):
            self.group.kv.forget_all(data)
            self.group.publishing.forget(data)

    def place_experts(self, version: int) -> None:
        """Takes over a placement that ranks loaded between two epochs; it counts as the moves
        ``version``.
        """
        self.group.moves.placed(version)

    def move_experts(self, moves: Sequence[Transfer]) -> None:
        """Lets later plans start these moves, one after another, and commit them."""
        self.group.moves.offer(moves)

    def shrink(self, data: int, num_pages: int) -> None:
        """Lowers the pool size of ``data``, which runs nothing, to that of its new rank. Ends
        requests that no longer fit into every pool.
        """
        too_long = self.group.shrink(data, num_pages)
        most = self.group.max_len
        for request in too_long:
            reason = f"A rank was replaced by one whose KV cache holds {most} tokens, fewer than before"
            self._ledger.fail(request, reason)

    def adopt(self, data: int, pages_i32: bytes, hashes_h128: bytes) -> None:
        """Takes over blocks that all ranks of ``data`` hold since an earlier controller: their
        hashes and pages. Called before the first step.
        """
        self.group.kv.adopt(data, np.frombuffer(pages_i32, np.int32).astype(np.int64), as_keys(hashes_h128))

    # ----------------------------------------------------------------- steps

    @property
    def wants_plan(self) -> bool:
        """Whether the depth of the group allows another plan now."""
        return self.group.steps.in_flight < self.group.mesh.depth

    def plan(self) -> GroupPlan | None:
        """The next plan, or None when there is no work or too much in flight."""
        if not self.wants_plan:
            return None
        plan = self._builder.build()
        if plan is not None:
            self._announce_started(plan)
        return plan

    def tidy(self) -> None:
        """Settles rows that have drained, and reserves rows for waiting requests."""
        self._ledger.settle()
        self._admission.reserve()

    def take_staging(self) -> list[tuple[int, Preload | Unload]]:
        """Bulk messages for ranks since the last call, as (rank, message)."""
        return self.group.preloads.take()

    def take_output(self) -> list[tuple[int, Message]]:
        """Messages for frontends since the last call, as (frontend, message)."""
        return self.outbox.take(self.group.steps.last_step)

    def take_changes(self) -> list[Change]:
        """Changes of the block index since the last call; none unless ``Settings.tell_changes``."""
        changes = self.group.changes
        return [] if changes is None else changes.take()

    def idle(self) -> bool:
        """Whether nothing runs, waits or drains."""
        group = self.group
        return not group.open and not group.draining and not len(group.queue)

    def check(self) -> None:
        """Integrity of all bookkeeping (tests, and on demand). Raises AssertionError."""
        group, rows = self.group, self.group.rows
        group.kv.check()
        for row, request in enumerate(rows.requests):
            assert (request is None) == (rows.state[row] == State.FREE), (
                f"row {row}: state {rows.state[row]}, request {request}"
            )
        for request in group.open.values():
            num_bytes = len(request.prompt_i32) + len(request.emitted_i32)
            assert 4 * request.num_staged == num_bytes, f"request {request.handle}: staged tokens miscounted"
        for data in range(group.mesh.data):
            held = [rows.pages[row, : rows.num_pages[row]] for row in rows.of_data(data)]
            num_pages = len(np.unique(np.concatenate(held)))
            used = group.kv.used()[data]
            assert num_pages == used, f"data {data}: rows hold {num_pages} pages, {used} referenced"

    def _announce_started(self, plan: GroupPlan) -> None:
        rows = self.group.rows
        for data, section in plan.sections.items():
            for admit in section.admit:
                request = rows.request(rows.row(data, admit.slot))
                request.started = True
                start = Start(request.handle, admit.num_cached, data, request.preemptions, plan.header.epoch)
                self.outbox.start(request.frontend, start)

    def _queue_is_full(self) -> bool:
        group, waiting = self.group, len(self.group.queue)
        return waiting >= group.spec.max_queue and waiting >= group.spec.max_queue + group.num_free_rows()

    def _retry_after(self) -> float:
        """Seconds until the queue has probably moved on: its prompt tokens at the fitted rate, at
        least one.
        """
        group = self.group
        tokens = sum(request.num_staged for request in group.queue)
        return max(1.0, group.cost.cost.token * tokens / max(1, len(group.steps.living())))
