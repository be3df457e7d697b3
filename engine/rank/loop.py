"""A rank's side of the protocol: plans in, results out, with any executor. It does without torch,
so that ranks can be simulated.
"""

from __future__ import annotations

import logging

import msgspec
from msgspec import structs

from ..protocol.bulk import Disband, Preload, Preloaded, Published, SetPlacement, ToRankBulk, Unload
from ..protocol.chain import Chain, Verdict
from ..protocol.message import Stop
from ..protocol.plan import StepPlan
from ..protocol.results import Abandoned, Refused, StepResult
from ..protocol.sockets import decode_plan, encode
from .contract import StepAbandoned, StepExecutor, StepFailed
from .sockets import POLL_MILLISECONDS, RankSockets

_LOG = logging.getLogger(__name__)

_COMPILING_MILLISECONDS = 2
"""Time between checks of a grammar that is being compiled."""


class RankLoop:
    """Executes the chain of plans: ignores duplicates, refuses gaps, decides nothing else."""

    def __init__(self, rank: int, executor: StepExecutor, sockets: RankSockets) -> None:
        self._rank = rank
        self._executor = executor
        self._sockets = sockets
        self._bulk_decoder = msgspec.msgpack.Decoder(ToRankBulk)
        self._chain = Chain()
        self._running: tuple[int, int] | None = None  # epoch and step

    def run(self) -> str:
        """Serves until the controller says Stop, and returns its reason. Raises ControllerLost,
        StepFailed, or the error of an executor that cannot leave an epoch.
        """
        while True:
            compiling = self._executor.compiling
            wait = _COMPILING_MILLISECONDS if compiling else POLL_MILLISECONDS
            connected, bulk, step = self._sockets.poll(wait)
            if compiling:
                for staged, error in self._executor.take_compiled():
                    self._sockets.bulk.send(encode(Preloaded(self._rank, staged, error)))
            if connected:
                stop = self._say_hello()
                if stop is not None:
                    return stop.reason
            elif bulk:
                stop = self._take(self._bulk_decoder.decode(self._sockets.bulk.recv()))
                if stop is not None:
                    return stop.reason
            elif step:  # staged prompts come before the plans that may name them
                plan = decode_plan(*self._sockets.step.recv_multipart())
                answer = self.follow(plan)
                if answer is not None:
                    self._sockets.step.send(encode(answer))
                if plan.header.trace and (spans := self._executor.take_spans()) is not None:
                    self._sockets.bulk.send(encode(spans))

    @property
    def progress(self) -> tuple[int, int, int] | None:
        """(epoch, step, phases entered so far) of the step under way; None between steps."""
        running = self._running
        return None if running is None else (*running, self._executor.phases_entered)

    def follow(self, plan: StepPlan) -> StepResult | Refused | Abandoned | None:
        """Answers a plan. None for a plan that was executed before, or whose epoch has passed or
        was abandoned.
        """
        header = plan.header
        verdict = self._chain.judge(plan)
        if verdict is Verdict.OLD:
            return None
        if verdict is Verdict.GAP:
            return Refused(header.group, header.epoch, self._rank, self._chain.last_step, header.step)
        self._running = header.epoch, header.step
        try:
            if self._chain.enter(header.epoch):
                _LOG.info("epoch %d begins with step %d", header.epoch, header.step)
                self._executor.begin_epoch(header.epoch, header.vacant)
            result = self._executor.execute(plan)
        except StepAbandoned as error:
            _LOG.warning("epoch %d, step %d abandoned: %s", header.epoch, header.step, error)
            self._chain.abandon()
            return Abandoned(header.group, header.epoch, self._rank, header.step, str(error))
        except Exception as error:
            cause = f"{type(error).__name__}: {error}"
            raise StepFailed(f"epoch {header.epoch}, step {header.step}: {cause}") from error
        finally:
            self._running = None
        self._chain.executed(header.step)
        return result

    def _say_hello(self) -> Stop | None:
        """Says hello on a new connection, perhaps to a controller that knows nothing: throws away
        what came before, so that no earlier plan changes any page that it tells of. A Stop among it
        counts.
        """
        before = map(self._bulk_decoder.decode, self._sockets.discard())
        stop = next((message for message in before if isinstance(message, Stop)), None)
        if stop is not None:
            return self._take(stop)
        epoch = self._chain.epoch
        if epoch >= 0:
            self._leave_epoch()
            self._sockets.bulk.send(encode(Published(self._rank, *self._executor.published())))
        self._introduce()
        return None

    def _introduce(self) -> None:
        self._sockets.bulk.send(encode(structs.replace(self._executor.hello(), epoch=self._chain.epoch)))

    def _leave_epoch(self) -> None:
        self._chain.abandon()
        self._executor.end_epoch()

    def _take(self, message: Preload | Unload | SetPlacement | Disband | Stop) -> Stop | None:
        if isinstance(message, Preload):
            if self._executor.stage(message.staged, message.tokens_i32, message.grammar, message.num_emitted):
                self._sockets.bulk.send(encode(Preloaded(self._rank, message.staged)))
        elif isinstance(message, Unload):
            self._executor.unstage(message.staged)
        elif isinstance(message, SetPlacement):
            _LOG.info("loading the experts of placement %d", message.version)
            self._executor.place(message.version, message.placement_i32)
            self._introduce()
        elif isinstance(message, Disband):
            if self._chain.epoch <= message.epoch:
                self._leave_epoch()
        else:
            _LOG.info("stop: %s", message.reason or "no reason given")
            return message
        return None
