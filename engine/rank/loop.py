"""A rank's side of the protocol: plans in, results out, with any executor. It does without torch,
so that ranks can be simulated.
"""

from __future__ import annotations

import logging
from collections import deque

import msgspec
from msgspec import structs

from ...parallel.recovery import ProcessSpent
from ..protocol.bulk import Disband, Preload, Preloaded, Published, SetPlacement, ToRankBulk, Unload
from ..protocol.chain import Chain, Verdict
from ..protocol.message import Stop, encode
from ..protocol.plan import Header, StepPlan, decode_plan
from ..protocol.results import Abandoned, Refused, StepResult
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
        self._under_way: deque[Header] = deque()  # headers of steps whose results were not sent yet

    def run(self) -> str:
        """Serves until the controller says Stop, and returns its reason. Raises ControllerLost,
        StepFailed, or ProcessSpent where the executor cannot leave an epoch.
        """
        while True:
            self._send_results()
            compiling = self._executor.compiling
            wait = _COMPILING_MILLISECONDS if compiling else POLL_MILLISECONDS
            connected, bulk, step = self._sockets.poll(0 if self._under_way else wait)
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
                answer = self._follow(decode_plan(*self._sockets.step.recv_multipart()))
                if answer is not None:
                    self._sockets.step.send(encode(answer))

    @property
    def progress(self) -> tuple[int, int, int] | None:
        """(epoch, step, phases entered so far) of the oldest step under way; None between steps."""
        try:
            header = self._under_way[0]
        except IndexError:
            return None
        return header.epoch, header.step, self._executor.phases_entered

    def _follow(self, plan: StepPlan) -> Refused | Abandoned | None:
        """Begins the step of a plan, unless it was executed before, or its epoch has passed or was
        abandoned. Answers where its result will not.
        """
        header = plan.header
        verdict = self._chain.judge(plan)
        if verdict is Verdict.OLD:
            return None
        if verdict is Verdict.GAP:
            return Refused(header.group, header.epoch, self._rank, self._chain.last_step, header.step)
        begins = self._chain.enter(header.epoch)
        if begins:
            _LOG.info("epoch %d begins with step %d", header.epoch, header.step)
            self._under_way.clear()
        self._under_way.append(header)
        try:
            if begins:
                self._executor.begin_epoch(header.epoch, header.vacant)
            self._executor.submit(plan)
        except StepAbandoned as error:
            return self._abandon(header, error)
        except ProcessSpent:
            raise
        except Exception as error:
            raise _failed(header, error) from error
        self._chain.executed(header.step)
        return None

    def _send_results(self) -> None:
        """Sends the results of the steps that are done."""
        while self._under_way:
            header = self._under_way[0]
            try:
                answer: StepResult | Abandoned | None = self._executor.take()
            except StepAbandoned as error:
                answer = self._abandon(header, error)
            except ProcessSpent:
                raise
            except Exception as error:
                raise _failed(header, error) from error
            if answer is None:
                return
            if self._under_way:
                self._under_way.popleft()
            self._sockets.step.send(encode(answer))
            if header.trace and (spans := self._executor.take_spans()) is not None:
                self._sockets.bulk.send(encode(spans))

    def _abandon(self, header: Header, error: StepAbandoned) -> Abandoned:
        """Gives up a step, and those begun after it."""
        _LOG.warning("epoch %d, step %d abandoned: %s", header.epoch, header.step, error)
        self._chain.abandon()
        self._under_way.clear()
        return Abandoned(header.group, header.epoch, self._rank, header.step, str(error))

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
        self._under_way.clear()
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


def _failed(header: Header, error: Exception) -> StepFailed:
    return StepFailed(f"epoch {header.epoch}, step {header.step}: {type(error).__name__}: {error}")
