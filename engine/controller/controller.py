"""The controller process: moves messages between sockets and the planner, and decides when a plan
leaves.

One thread, no asyncio, no HTTP. The order within a turn is the order of urgency: results, plan out,
then admission, staging and output, then housekeeping twice a second.
"""

from __future__ import annotations

import gc
import logging
import time
from pathlib import Path

from ..planner.ledger import StateMismatch
from ..planner.planner import Planner
from ..planner.settings import Settings
from ..protocol.bulk import Preloaded, RankHello
from ..protocol.frontends import (
    Abort,
    Drain,
    FromFrontend,
    FrontendHello,
    Heartbeat,
    RankLost,
    Rejected,
    Submit,
)
from ..protocol.lobby import Lobby
from ..protocol.message import Stop
from ..protocol.results import Refused, StepResult
from ..protocol.specs import ControllerSpec
from ..recording.recorder import Recorder
from .hang_detector import Vigil
from .pacer import Pacer
from .status import Census
from .transport import Transport

log = logging.getLogger(__name__)

LAUNCHER = b"launcher"
_HOUSEKEEPING = 0.5


class Controller:
    """Serves one group from its ranks' hellos until it is stopped."""

    def __init__(self, spec: ControllerSpec) -> None:
        self._spec = spec
        self._transport = Transport(spec)
        self._lobby = Lobby(spec.lobby, "controller")
        self._census = Census(spec.mesh)
        self._frontends: list[bytes] = []
        self._leases: dict[bytes, tuple[float, float]] = {}
        self._lives: dict[bytes, int] = {}
        self._stopping = False
        self._drain_deadline: float | None = None
        self._recovery_deadline: float | None = None
        self._planner: Planner | None = None
        self._recorder: Recorder | None = None
        self._vigil = Vigil(spec.collective_deadline)
        self._pacer = Pacer(enabled=spec.scheduler.pacing)
        self._next_housekeeping = 0.0

    @property
    def census(self) -> Census:
        return self._census

    @property
    def addresses(self) -> tuple[str, ...]:
        """(step, bulk, frontend) addresses."""
        return self._transport.addresses

    def stop(self) -> None:
        """Asks the loop to end; safe in a signal handler."""
        self._stopping = True

    def run(self) -> None:
        """Serves until ``Stop``. Raises TimeoutError when ranks stay away at the start."""
        self._lobby.report("starting", "waiting for ranks", address=self.addresses)
        try:
            self._gather()
            if self._planner is not None:
                self._serve(self._planner)
            self._lobby.report("stopped")
        finally:
            for rank in range(self._spec.mesh.world):
                self._transport.send_bulk(rank, Stop("the controller has stopped"))
            for name in self._frontends:
                self._transport.send_frontend(name, Stop("the controller has stopped"))
            self._transport.close()
            if self._recorder is not None:
                self._recorder.close()
            self._lobby.close()

    # ----------------------------------------------------------------- start

    def _gather(self) -> None:
        """Waits for every rank's hello, then builds the planner."""
        world, deadline = self._spec.mesh.world, time.monotonic() + self._spec.rank_deadline
        hellos: dict[int, RankHello] = {}
        while len(hellos) < world and not self._stopping:
            self._transport.wait(min(_HOUSEKEEPING, max(0.0, deadline - time.monotonic())))
            for message in self._transport.bulk_messages():
                if isinstance(message, RankHello):
                    hellos[message.rank] = message
                    self._lobby.report(
                        "starting", f"{len(hellos)} of {world} ranks are here", len(hellos) / world
                    )
            self._listen_to_frontends(time.monotonic())
            if time.monotonic() > deadline:
                missing = [rank for rank in range(world) if rank not in hellos]
                raise TimeoutError(
                    f"ranks {missing} have not reported within {self._spec.rank_deadline:.0f} s"
                )
        if self._stopping:
            return
        settings = self._settings(hellos)
        self._planner = settings.planner()
        self._census.open(hellos, settings.max_len)
        if self._spec.recording:
            self._recorder = Recorder(Path(self._spec.recording), settings)
        pages = f"{sum(settings.num_pages)} pages of {settings.page_size} tokens"
        self._lobby.report("ready", f"{world} ranks, {pages}, context {settings.max_len}")

    def _settings(self, hellos: dict[int, RankHello]) -> Settings:
        """Pool sizes and the longest context; raises ValueError when the configured context does
        not fit.
        """
        mesh = self._spec.mesh
        num_pages = [min(hellos[rank].num_pages for rank in mesh.members(data)) for data in range(mesh.data)]
        page_size = hellos[0].page_size
        fits = min(num_pages) * page_size
        wanted = self._spec.max_len
        if wanted is not None and wanted > fits:
            raise ValueError(
                f"model.max_len is {wanted}, but the KV cache of a rank holds {fits} tokens: "
                f"lower model.max_len to {fits} or raise kv_cache.memory"
            )
        max_len = wanted if wanted is not None else min(self._spec.model_max_len, fits)
        if max_len < self._spec.model_max_len:
            known = self._spec.model_max_len
            log.info(
                "the context is limited to %d tokens of the model's %d by the KV cache (%d tokens a rank)",
                max_len,
                known,
                fits,
            )
        return Settings(mesh, self._spec.scheduler, num_pages, page_size, max_len)

    # ----------------------------------------------------------------- the loop

    def _serve(self, planner: Planner) -> None:
        self._census.phase = "serving"
        gc.collect()
        gc.freeze()
        gc.disable()
        while not self._stopping:
            now = time.monotonic()
            can_plan = planner.wants_plan and not self._census.missing
            self._transport.wait(
                min(self._next_housekeeping - now, self._pacer.wait(now) if can_plan else _HOUSEKEEPING)
            )
            turn = time.perf_counter()
            self._listen_to_ranks(planner)
            now = time.monotonic()
            if planner.wants_plan and self._pacer.due(now) and not self._census.missing:
                self._plan(planner, turn)
            self._listen_to_frontends(now)
            if self._census.missing:
                self._send_output(planner)
            else:
                self._follow_up(planner)
            if now >= self._next_housekeeping:
                self._next_housekeeping = now + _HOUSEKEEPING
                self._keep_house(planner, now)

    def _listen_to_ranks(self, planner: Planner) -> None:
        results: list[StepResult] = []
        for message in self._transport.step_messages():
            if isinstance(message, StepResult):
                results.append(message)
            elif isinstance(message, Refused):
                self._refused(planner, message)
            elif message.epoch == planner.group.epoch:
                log.warning("rank %d abandoned step %d: %s", message.rank, message.step, message.reason)
                self._vigil.abandoned(message.rank, time.monotonic())
        if results:
            self._book(planner, results)
        for bulk in self._transport.bulk_messages():
            if isinstance(bulk, Preloaded):
                self._record("staged", bulk)
                planner.staged(bulk)
                self._pacer.work_arrived()
            else:
                if (
                    bulk.rank not in self._census.missing
                ):  # the launcher has told before it put another there; was it read?
                    self._listen_to_frontends(time.monotonic())
                if bulk.rank in self._census.missing:
                    self._replaced(planner, bulk)

    def _book(self, planner: Planner, results: list[StepResult]) -> None:
        before = planner.group.newest_result
        self._record("results", results)
        try:
            planner.results(results)
        except StateMismatch as error:
            self._fail(planner, str(error))
        self._census.observe(results)
        if planner.group.newest_result > before:
            self._pacer.first_result(time.monotonic(), planner.group.in_flight, self._census.step_seconds())

    def _refused(self, planner: Planner, message: Refused) -> None:
        log.error(
            "rank %d refused step %d: it has executed %d", message.rank, message.step, message.last_step
        )
        self._record("refused", message)
        planner.refused(message)

    def _plan(self, planner: Planner, turn: float) -> None:
        plan = planner.plan()
        if self._recorder is not None:
            self._recorder.plan(plan)
        if plan is None:
            self._pacer.nothing_to_do()
            return
        largest = self._transport.send_plan(plan)
        self._pacer.sent(time.monotonic())
        self._census.planned(
            time.perf_counter() - turn, largest, plan, planner.group.flights[plan.header.step].tokens
        )

    def _follow_up(self, planner: Planner) -> None:
        """What can wait until the plan is out: settling, admission, prompts to ranks, tokens to
        frontends.
        """
        self._record("tidy")
        planner.tidy()
        for rank, message in planner.take_staging():
            self._transport.send_bulk(rank, message)
        self._send_output(planner)

    def _send_output(self, planner: Planner) -> None:
        for frontend, output in planner.take_output():
            self._transport.send_frontend(self._frontends[frontend], output)

    # ----------------------------------------------------------------- frontends and the launcher

    def _listen_to_frontends(self, now: float) -> None:
        for name, message in self._transport.frontend_messages():
            if name in self._leases:
                self._leases[name] = (now + self._leases[name][1], self._leases[name][1])
            if isinstance(message, FrontendHello):
                self._welcome(name, message, now)
            elif isinstance(message, Submit | Abort):
                if name in self._leases:
                    self._request(name, message)
            elif not isinstance(message, Heartbeat):
                self._command(name, message, now)

    def _welcome(self, name: bytes, hello: FrontendHello, now: float) -> None:
        if name not in self._frontends:
            self._frontends.append(name)
        elif self._lives[name] != hello.life:
            log.warning(
                "another process is frontend %s: the requests of the one before it are aborted", name.decode()
            )
            self._abort_frontend(name)
        self._lives[name] = hello.life
        self._leases[name] = (now + hello.lease, hello.lease)
        self._transport.send_frontend(name, self._census.state(self._planner))

    def _abort_frontend(self, name: bytes) -> None:
        if self._planner is not None:
            self._record("abort_frontend", self._frontends.index(name))
            self._planner.abort_frontend(self._frontends.index(name))

    def _request(self, name: bytes, message: Submit | Abort) -> None:
        frontend = self._frontends.index(name)
        if isinstance(message, Abort):
            if self._planner is not None:
                self._record("abort", frontend, message)
                self._planner.abort(frontend, message)
        elif self._planner is None or self._census.phase not in ("serving", "recovering"):
            reason = self._census.reason or f"the cluster is {self._census.phase}"
            self._transport.send_frontend(name, Rejected(message.handle, 503, reason, retry_after=5.0))
        else:
            self._record("submit", frontend, message)
            self._planner.submit(frontend, message)
            self._pacer.work_arrived()

    def _command(self, name: bytes, message: FromFrontend, now: float) -> None:
        """Commands: draining is anyone's who may talk to us (frontends check the admin key), the
        rest the launcher's.
        """
        if isinstance(message, Drain):
            self._drain(now + message.deadline)
            self._next_housekeeping = now
        elif name != LAUNCHER:
            log.warning("%s sent %s, which only the launcher may", name.decode(), type(message).__name__)
        elif isinstance(message, Stop):
            self._stopping = True
        elif isinstance(message, RankLost):
            self._lost(message)

    def _drain(self, deadline: float) -> None:
        """A second drain may shorten the first."""
        if self._census.phase in ("serving", "recovering"):
            self._census.phase, self._census.reason = "draining", ""
        if self._census.phase == "draining":
            self._drain_deadline = (
                deadline if self._drain_deadline is None else min(deadline, self._drain_deadline)
            )

    # ----------------------------------------------------------------- lost ranks

    def _lost(self, message: RankLost) -> None:
        """A rank is gone. Its requests wait, with all their tokens, until the launcher has put
        another in its place.
        """
        planner = self._planner
        self._census.lost(message.rank)
        reason = f"rank {message.rank} is lost: {message.reason}"
        if planner is None or self._census.phase not in ("serving", "recovering", "draining"):
            self._census.reason = reason
            return
        log.error("%s; waiting for its replacement", reason)
        data = planner.group.mesh.data_of_rank(message.rank)
        self._begin_epoch(planner, [data])
        if self._census.phase == "serving":
            self._census.phase = "recovering"
        self._census.reason = reason
        self._recovery_deadline = time.monotonic() + self._spec.rank_deadline
        self._next_housekeeping = 0.0

    def _begin_epoch(self, planner: Planner, emptied: list[int]) -> None:
        self._record("begin_epoch", [], emptied)
        planner.begin_epoch(emptied=emptied)
        self._vigil.reset()
        self._pacer.work_arrived()

    def _replaced(self, planner: Planner, hello: RankHello) -> None:
        """A rank has said hello in the place of a lost one; when the last has, the group goes
        on.
        """
        pages = int(planner.group.kv.num_pages[planner.group.mesh.data_of_rank(hello.rank)])
        if hello.num_pages < pages:
            self._fail(
                planner,
                f"rank {hello.rank} came back with {hello.num_pages} pages, it had {pages}: set kv_cache.memory",
            )
            return
        self._census.back(hello)
        if self._census.missing:
            return
        log.info("all ranks are back; epoch %d begins", planner.group.epoch)
        if self._census.phase == "recovering":
            self._census.phase = "serving"
        self._census.reason = ""
        self._recovery_deadline = None
        self._next_housekeeping = 0.0
        self._pacer.all_answered(time.monotonic())
        self._pacer.work_arrived()

    # ----------------------------------------------------------------- housekeeping

    def _keep_house(self, planner: Planner, now: float) -> None:
        for name in [name for name, (expiry, _) in self._leases.items() if expiry < now]:
            log.warning(
                "frontend %s has been silent for longer than its lease: its requests are aborted",
                name.decode(),
            )
            del self._leases[name]
            self._abort_frontend(name)
        self._watch(planner, now)
        if (
            self._drain_deadline is not None
            and self._census.phase == "draining"
            and (planner.idle() or now >= self._drain_deadline)
        ):
            if not planner.idle():
                log.warning(
                    "draining took longer than its deadline: %d requests are ended", len(planner.group.open)
                )
                self._fail_all(planner)
                self._follow_up(planner)
            self._census.phase, self._census.reason = "drained", ""
        state = self._census.state(planner)
        for name in self._leases:
            self._transport.send_frontend(name, state)
        if planner.idle() and not planner.group.in_flight:
            gc.collect()
        if self._recorder is not None:
            self._recorder.flush()
            if self._recorder.failure:
                self._lobby.report(
                    "ready", f"the recording to {self._spec.recording} has ended: {self._recorder.failure}"
                )
                self._recorder.close()
                self._recorder = None

    def _watch(self, planner: Planner, now: float) -> None:
        """Finds ranks that hang, and says when one was not replaced within its deadline."""
        group = planner.group
        if self._census.missing:
            if self._recovery_deadline is not None and now > self._recovery_deadline:
                missing = sorted(self._census.missing)
                self._fail(
                    planner,
                    f"{self._census.reason}; no replacement for ranks {missing} within {self._spec.rank_deadline:.0f} s",
                )
            return
        behind = [rank for rank, step in enumerate(group.acknowledged) if step < group.next_step - 1]
        if not behind:
            self._pacer.all_answered(now)
        if self._census.hung:
            if self._pacer.silent_for(now) > self._spec.rank_deadline:
                self._fail(planner, f"ranks {sorted(self._census.hung)} hang and have not been replaced")
            return
        judgement = self._vigil.judge(now, behind, self._pacer.silent_for(now), group.predicted_seconds())
        if judgement.regroup:
            log.error("every rank has abandoned the step in hand: epoch %d begins", group.epoch + 1)
            self._begin_epoch(planner, [])
        for rank in judgement.hung:
            step = int(group.acknowledged[rank]) + 1
            log.error(
                "rank %d on %s hangs in step %d: it has to be replaced", rank, self._census.host(rank), step
            )
            self._census.hangs(rank)
            self._census.reason = f"rank {rank} hangs in step {step}"

    def _fail(self, planner: Planner, reason: str) -> None:
        """The group cannot go on: every open request gets an error, health says why."""
        if self._census.phase == "failed":
            return
        log.error("the cluster has failed: %s", reason)
        self._census.phase, self._census.reason = "failed", reason
        self._next_housekeeping = 0.0
        self._fail_all(planner)
        self._send_output(planner)
        self._lobby.report("failed", reason)

    def _fail_all(self, planner: Planner) -> None:
        self._record("fail_all")
        planner.fail_all()

    def _record(self, name: str, *arguments: object) -> None:
        if self._recorder is not None:
            self._recorder.event(name, *arguments)
