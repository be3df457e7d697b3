"""The controller's turn while it serves: moves messages between sockets and the planner.

One thread, no asyncio, no HTTP. The order within a turn is the order of urgency: results, the plan,
then events, admission and output, then housekeeping twice a second.
"""

from __future__ import annotations

import gc
import logging
import math
import time

from ..planner.ledger import StateMismatch
from ..protocol.bulk import Disband, Preloaded, RankHello, StepProgress
from ..protocol.cluster_state import ClusterState
from ..protocol.frontends import Abort, RankLost, Submit
from ..protocol.lobby import Lobby
from ..protocol.results import Refused, StepResult
from ..protocol.timeline import AskTimeline, StepSpans
from ..protocol.turns import Turns
from .balancer import Balancer
from .frontends import Frontends
from .membership import Membership
from .pilot import Pilot
from .status import ClusterStatus
from .step_timeline import StepTimeline
from .transport import Transport

log = logging.getLogger(__name__)

_HOUSEKEEPING = 0.5


class Serving:
    """Serves one group whose ranks are all there, until a stop is requested."""

    def __init__(
        self,
        transport: Transport,
        frontends: Frontends,
        lobby: Lobby,
        pilot: Pilot,
        membership: Membership,
        status: ClusterStatus,
        balancer: Balancer,
    ) -> None:
        self._transport, self._frontends, self._lobby = transport, frontends, lobby
        self._pilot, self._membership, self._status = pilot, membership, status
        self._balancer = balancer
        self._timeline = StepTimeline(pilot.group.mesh, transport.send_frontend)
        self._next_housekeeping = 0.0
        self._drain_deadline = math.inf
        self._turns = Turns(time.monotonic())
        self._epoch = 0

    def run(self) -> None:
        """Takes turns, each when a message arrives, a plan is due or housekeeping is."""
        gc.collect()
        gc.freeze()
        gc.disable()
        while not self._frontends.stop_requested:
            now = time.monotonic()
            plan_due = max(self._membership.pause(now), self._pilot.wait(now))
            self._transport.wait(min(self._next_housekeeping - now, plan_due))
            turn_began = time.monotonic()
            if seconds := self._turns.take(turn_began):
                self._stood_still(seconds)
            self._take_turn(turn_began)

    def _take_turn(self, turn_began: float) -> None:
        """Silence is judged by when the turn began: this process may stand still in the middle of
        it, which the next turn notices.
        """
        began = time.perf_counter()
        self._listen_to_ranks()
        now = time.monotonic()
        if not self._membership.pause(now) and self._pilot.due(now):
            self._plan(now, began)
        self._status.add_up()
        self._frontends.listen(now, self)
        if self._membership.pause(now):
            self._frontends.send(self._pilot.take_output())
        else:
            self._follow_up()
        self._disband()
        for rank, place in self._membership.survivors.take_orders():
            self._transport.send_bulk(rank, place)
        if now >= self._next_housekeeping:
            self._keep_house(turn_began)

    def _stood_still(self, seconds: float) -> None:
        """This process stood still, perhaps with all others: nothing is judged by the time that has
        passed meanwhile.
        """
        now = time.monotonic()
        log.warning("the controller stood still for %.1f s", seconds)
        self._frontends.extend_leases(now)
        self._membership.stood_still(seconds, now)

    # ----------------------------------------------------------------- ranks

    def _listen_to_ranks(self) -> None:
        results: list[StepResult] = []
        for message in self._transport.step_messages():
            if isinstance(message, StepResult):
                results.append(message)
            elif isinstance(message, Refused):
                rank, step, last = message.rank, message.step, message.last_step
                log.error("rank %d refused step %d: it has executed %d", rank, step, last)
                self._pilot.refused(message)
            else:
                self._membership.abandoned(message, time.monotonic())
        if results:
            self._book(results)
        for bulk in self._transport.bulk_messages():
            if isinstance(bulk, Preloaded):
                self._pilot.staged(bulk)
            elif isinstance(bulk, StepProgress):
                self._membership.progressed(bulk, time.monotonic())
            elif isinstance(bulk, RankHello):
                self._welcome(bulk)
            elif isinstance(bulk, StepSpans):
                self._timeline.take(bulk)

    def _book(self, results: list[StepResult]) -> None:
        if self._timeline.is_open:
            self._timeline.answered(results, time.perf_counter())
        self._status.observe(results)
        if self._membership.cold:
            self._membership.answered(results)
        try:
            self._pilot.book(results, time.monotonic(), self._status.step_seconds())
        except StateMismatch as error:
            self._fail(str(error))

    def _disband(self) -> None:
        """Tells ranks that an epoch is over: some may wait in a collective for one that will not
        come, and some for a device that does.
        """
        epoch = self._pilot.group.steps.epoch
        if epoch != self._epoch:
            for rank in range(self._pilot.group.mesh.world):
                self._transport.send_bulk(rank, Disband(epoch - 1))
                self._transport.send_pulse(rank, Disband(epoch - 1))
            self._epoch = epoch

    def _welcome(self, hello: RankHello) -> None:
        """Takes a replacement, or a rank whose connection was away. The loss that a replacement
        follows was reported first, but may still be unread. One with the experts of the start loads
        those that it has to have, and says hello again.
        """
        now, lost, survivors = time.monotonic(), self._membership.lost_ranks, self._membership.survivors
        if hello.rank not in lost:
            self._frontends.listen(now, self)
        if hello.rank not in lost:
            self._membership.returned(hello, now)
        if hello.rank in lost:
            if survivors.is_behind(hello):
                self._transport.send_bulk(hello.rank, survivors.place)
            else:
                self._membership.replaced(hello, now)
                self._balancer.joined(hello)
        self._next_housekeeping = 0.0

    def _plan(self, now: float, began: float) -> None:
        plan = self._pilot.plan(now)
        if plan is not None:
            if self._timeline.is_open:
                plan = self._timeline.mark(plan, began)
            largest = self._transport.send_plan(plan)
            tokens_D = self._pilot.group.steps.flights[plan.header.step].tokens
            sent = time.perf_counter()
            self._status.planned(sent - began, largest, plan, tokens_D)
            self._balancer.planned(plan)
            if plan.header.trace:
                self._timeline.sent(plan.header, len(plan.sections), int(tokens_D.sum()), (began, sent))

    def _follow_up(self) -> None:
        staging, output = self._pilot.follow_up()
        for rank, message in staging:
            self._transport.send_bulk(rank, message)
        self._frontends.send(output)

    # ----------------------------------------------------------------- frontends, launcher

    def state(self) -> ClusterState:
        return self._status.state(self._membership.conditions())

    def submit(self, frontend: int, message: Submit) -> str:
        phase = self._status.phase
        going_on = phase == "draining" and self._pilot.continues(frontend, message)
        if phase not in ("serving", "recovering") and not going_on:
            return self._status.reason or f"the cluster is {self._status.phase}"
        self._pilot.submit(frontend, message)
        return ""

    def abort(self, frontend: int, message: Abort) -> None:
        self._pilot.abort(frontend, message)

    def abort_frontend(self, frontend: int) -> None:
        self._pilot.abort_frontend(frontend)

    def drain(self, now: float, deadline: float) -> None:
        """A second drain may shorten the first."""
        if self._status.phase in ("serving", "recovering"):
            self._status.phase, self._status.reason = "draining", ""
            log.info("draining: %d requests are open", len(self._pilot.planner.group.open))
        if self._status.phase == "draining":
            self._drain_deadline = min(deadline, self._drain_deadline)
        self._next_housekeeping = now

    def timeline(self, name: bytes, message: AskTimeline) -> None:
        epoch = self._pilot.group.steps.epoch
        self._timeline.ask(name, message, epoch, time.perf_counter())

    def rank_lost(self, message: RankLost) -> None:
        self._membership.lost(message, time.monotonic())
        self._next_housekeeping = 0.0

    def degraded(self, reason: str) -> None:
        self._status.degraded = reason
        self._next_housekeeping = 0.0

    # ----------------------------------------------------------------- housekeeping

    def _keep_house(self, now: float) -> None:
        self._next_housekeeping = now + _HOUSEKEEPING
        self._frontends.end_leases(now, self)
        if failure := self._membership.watch(now):
            self._fail(failure)
        self._end_drain(now)
        self._frontends.tell(self.state())
        self._balancer.look()
        self._status.unbalanced = self._balancer.stopped
        self._timeline.look(self._pilot.group.steps.epoch, self._status.reason, time.perf_counter())
        if self._pilot.planner.idle() and not self._pilot.group.steps.in_flight:
            gc.collect()
        if failure := self._pilot.flush_recording():
            self._lobby.report("ready", failure)

    def _end_drain(self, now: float) -> None:
        planner = self._pilot.planner
        if self._status.phase != "draining" or not (planner.idle() or now >= self._drain_deadline):
            return
        if not planner.idle():
            left = len(planner.group.open)
            log.warning("draining took longer than its deadline: %d requests are ended", left)
            self._pilot.fail_all()
            self._follow_up()
        self._status.phase, self._status.reason = "drained", ""
        log.info("drained")

    def _fail(self, reason: str) -> None:
        """The group cannot go on: every open request gets an error, health says why."""
        if self._status.phase == "failed":
            return
        log.error("the cluster has failed: %s", reason)
        self._status.phase, self._status.reason = "failed", reason
        self._next_housekeeping = 0.0
        self._pilot.fail_all()
        self._frontends.send(self._pilot.take_output())
        self._lobby.report("failed", reason)
