"""A rank's side of the protocol: plans in, results out, against any executor. No torch here, so ranks can be simulated."""

from __future__ import annotations

import logging
import time
from typing import Protocol

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from ..protocol.chain import Chain, Verdict
from ..protocol.plan import (
    Abandoned,
    RankHello,
    Refused,
    Stage,
    Staged,
    StepPlan,
    StepResult,
    Stop,
    ToRankBulk,
    Unstage,
)
from ..protocol.sockets import ABSENCE_SECONDS, client_socket, decode_plan, encode, keep_watch, rank_identity
from ..protocol.specs import RankSpec

_LOG = logging.getLogger(__name__)

_POLL_MILLISECONDS = 500
_COMPILING_MILLISECONDS = 2  # between looks at a grammar that is being compiled


class ControllerLost(RuntimeError):
    """The controller has gone away and has not come back within the deadline."""


class StepFailed(RuntimeError):
    """A step could not be executed; the message holds the cause."""


class StepAbandoned(RuntimeError):
    """An exchange of the step did not complete because a peer is gone: this rank is well and waits for the next epoch."""


class StepExecutor(Protocol):
    """What executes plans: the model on this rank, or a simulation of it. Plans come in the order of their chain."""

    def hello(self) -> RankHello: ...

    def begin_epoch(self, epoch: int) -> None:
        """Meets the other ranks. Raises StepAbandoned when they do not come."""
        ...

    def stage(self, staged: int, tokens_i32: bytes, grammar: str, num_emitted: int) -> bool:
        """Takes a prompt. False when ``take_compiled`` will say when it can be admitted."""
        ...

    def unstage(self, staged: int) -> None: ...

    @property
    def compiling(self) -> bool:
        """Whether grammars of staged prompts are being compiled."""
        ...

    def take_compiled(self) -> list[tuple[int, str]]:
        """Staged prompts whose grammars are compiled since the last call, with the error where that failed."""
        ...

    def execute(self, plan: StepPlan) -> StepResult:
        """Raises StepAbandoned when a peer is lost in the middle."""
        ...


class RankSockets:
    """The rank's connections to the controller, and whether they stand.

    ``poll`` raises ControllerLost once a connection has been down for ``absence`` seconds, or was never made for
    ``patience`` seconds.
    """

    _MONITORED = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED

    def __init__(self, spec: RankSpec, absence: float = ABSENCE_SECONDS, patience: float = 60.0) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._poller = zmq.Poller()
        self._addresses: dict[zmq.Socket[bytes], str] = {}  # by the monitor of the socket
        self._down: set[zmq.Socket[bytes]] = set()
        self.step = self._connect(spec, spec.step_address)
        self.bulk = self._connect(spec, spec.bulk_address)
        self._absence = absence
        self._lost_at = time.monotonic() + patience - absence

    def poll(self, milliseconds: int = _POLL_MILLISECONDS) -> tuple[bool, bool, bool]:
        """Waits up to ``milliseconds``; whether (both connections stand anew, bulk has a message, step has a message).

        Who says hello before its step connection stands may be sent a plan that nobody keeps for it.
        """
        ready = dict(self._poller.poll(milliseconds))
        made = [self._watch(monitor) for monitor in self._addresses if monitor in ready]
        connected = any(made) and not self._down
        if not made and time.monotonic() - self._lost_at > self._absence:
            addresses = " and ".join(self._addresses[monitor] for monitor in self._addresses if monitor in self._down)
            raise ControllerLost(f"no connection to the controller at {addresses} for {self._absence:g} s")
        return connected, self.bulk in ready, self.step in ready

    def close(self) -> None:
        """Closes everything; the last message has a second to leave."""
        for socket in (self.step, self.bulk):
            socket.disable_monitor()
        for monitor in self._addresses:
            monitor.close(linger=0)
        for socket in (self.step, self.bulk):
            socket.close(linger=1000)
        self._context.term()

    def _connect(self, spec: RankSpec, address: str) -> zmq.Socket[bytes]:
        socket = client_socket(self._context, zmq.DEALER, spec.keys, rank_identity(spec.rank))
        monitor = socket.get_monitor_socket(self._MONITORED)
        self._addresses[monitor] = address
        self._down.add(monitor)
        for each in (socket, monitor):
            self._poller.register(each, zmq.POLLIN)
        keep_watch(socket)
        socket.connect(address)
        return socket

    def _watch(self, monitor: zmq.Socket[bytes]) -> bool:
        """Reads one event; whether a connection stands from now on."""
        stands = recv_monitor_message(monitor)["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED
        if stands:
            self._down.discard(monitor)
            self._lost_at = self._lost_at if self._down else float("inf")
        else:
            if not self._down:
                self._lost_at = time.monotonic()
            self._down.add(monitor)
        return stands


class RankLoop:
    """Executes the chain of plans: duplicates are ignored, gaps refused, and nothing is decided here."""

    def __init__(self, rank: int, executor: StepExecutor, sockets: RankSockets) -> None:
        self._rank = rank
        self._executor = executor
        self._sockets = sockets
        self._bulk_decoder = msgspec.msgpack.Decoder(ToRankBulk)
        self._chain = Chain()

    def run(self) -> str:
        """Serves until the controller says Stop; returns its reason. Raises ControllerLost or StepFailed."""
        while True:
            compiling = self._executor.compiling
            connected, bulk, step = self._sockets.poll(_COMPILING_MILLISECONDS if compiling else _POLL_MILLISECONDS)
            if compiling:
                for staged, error in self._executor.take_compiled():
                    self._sockets.bulk.send(encode(Staged(self._rank, staged, error)))
            if connected:
                self._sockets.bulk.send(encode(self._executor.hello()))
            if bulk:
                stop = self._take(self._bulk_decoder.decode(self._sockets.bulk.recv()))
                if stop is not None:
                    return stop.reason
            elif step:  # staged prompts come before the plans that may name them
                header, section = self._sockets.step.recv_multipart()
                answer = self.follow(decode_plan(header, section))
                if answer is not None:
                    self._sockets.step.send(encode(answer))

    def follow(self, plan: StepPlan) -> StepResult | Refused | Abandoned | None:
        """The answer to a plan; None for one that was executed before, and for all of an epoch that has passed or was abandoned."""
        header = plan.header
        verdict = self._chain.judge(plan)
        if verdict is Verdict.OLD:
            return None
        if verdict is Verdict.GAP:
            return Refused(header.group, header.epoch, self._rank, self._chain.last_step, header.step)
        try:
            if self._chain.enter(header.epoch):
                self._executor.begin_epoch(header.epoch)
            result = self._executor.execute(plan)
        except StepAbandoned as error:
            _LOG.warning("rank %d: epoch %d, step %d abandoned: %s", self._rank, header.epoch, header.step, error)
            self._chain.abandon()
            return Abandoned(header.group, header.epoch, self._rank, header.step, str(error))
        except Exception as error:
            raise StepFailed(f"epoch {header.epoch}, step {header.step}: {type(error).__name__}: {error}") from error
        self._chain.executed(header.step)
        return result

    def _take(self, message: Stage | Unstage | Stop) -> Stop | None:
        if isinstance(message, Stage):
            if self._executor.stage(message.staged, message.tokens_i32, message.grammar, message.num_emitted):
                self._sockets.bulk.send(encode(Staged(self._rank, message.staged)))
        elif isinstance(message, Unstage):
            self._executor.unstage(message.staged)
        else:
            _LOG.info("rank %d: stop: %s", self._rank, message.reason or "no reason given")
            return message
        return None
