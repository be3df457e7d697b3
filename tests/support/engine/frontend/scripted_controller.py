"""A controller for frontends that answers each ``Submit`` from a script. It is a real CURVE ROUTER
in a thread, without ranks.

A script is called with the ``Submit`` and yields an item per step: a list of tokens, ``None``
(nothing this step), a ``Finish``, or a ``Rejected`` without its handle. A request ends at its limit
and at its stop ids, as in the real engine.
"""

from __future__ import annotations

import struct
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

import msgspec
import zmq

from lockstep.engine.protocol.cluster_state import ClusterState
from lockstep.engine.protocol.frontends import (
    Abort,
    Drain,
    FrontendHello,
    HandleLogprobs,
    Heartbeat,
    Rejected,
    Started,
    Submit,
    TokenBatch,
)
from lockstep.engine.protocol.message import Finish, Stop, encode
from lockstep.engine.protocol.results import PromptLogprobs
from lockstep.engine.protocol.sockets import authenticate, new_keypair, server_socket
from lockstep.engine.protocol.specs import Keys
from lockstep.engine.protocol.timeline import AskTimeline, TimelineEnd

FromFrontend = FrontendHello | Submit | Abort | Heartbeat | Drain | AskTimeline
Item = list[int] | Finish | Rejected | None
Script = Callable[[Submit], Iterable[Item]]
Row = tuple[int, int, list[int], Finish]

STATE = ClusterState(
    phase="serving",
    reason="",
    epoch=1,
    step=0,
    max_len=512,
    page_size=16,
    prefix_caching=True,
    num_running=0,
    num_waiting=0,
    kv_usage=0.25,
    prompt_tokens=10,
    generation_tokens=20,
    prefix_queries=8,
    prefix_hits=4,
    preemptions=0,
    steps=5,
    imbalance=1.0,
    plan_seconds=0.001,
)


def say(tokens: Iterable[int]) -> Script:
    """One token per step, then silence."""

    def script(submit: Submit) -> Iterator[Item]:
        for token in tokens:
            yield [token]

    return script


@dataclass(slots=True, eq=False)
class _Running:
    identity: bytes
    submit: Submit
    items: Iterator[Item]
    stops: frozenset[int]
    left: int
    sent: int = 0
    started: bool = False


@dataclass
class ScriptedController:
    """``script`` may be replaced between requests. ``submits``, ``aborts``, ``hellos``,
    ``drains`` and ``timelines`` hold the messages that arrived.

    A ``silent`` controller neither hears nor speaks, as one that hangs, and forgets all hellos.
    ``stop`` reaches every peer that ever sent a message, and peers that say hello later.
    """

    script: Script
    step_seconds: float = 0.001
    num_cached: int = 0
    state: ClusterState = STATE
    submits: list[Submit] = field(default_factory=list)
    aborts: list[int] = field(default_factory=list)
    hellos: list[FrontendHello] = field(default_factory=list)
    drains: list[Drain] = field(default_factory=list)
    timelines: list[AskTimeline] = field(default_factory=list)
    open: dict[int, _Running] = field(default_factory=dict)
    silent: bool = False
    ends_timelines: bool = False  # at once and without a step

    def __post_init__(self) -> None:
        server, client = new_keypair(), new_keypair()
        self.keys = Keys(server_public=server[0], public=client[0], secret=client[1])
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._authenticator = authenticate(self._context, (client[0],))
        self._socket = server_socket(self._context, zmq.ROUTER, *server)
        self._socket.bind_to_random_port("tcp://127.0.0.1")
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._outbox: SimpleQueue[object] = SimpleQueue()
        self._decode = msgspec.msgpack.Decoder(FromFrontend).decode
        self._leave = threading.Event()
        self._stopping = False
        self._step = 0
        self._frontends: set[bytes] = set()
        self._known: set[bytes] = set()
        self._thread = threading.Thread(target=self._run, name="scripted-controller", daemon=True)
        self._thread.start()

    def send(self, message: object) -> None:
        """Sends to every frontend, from any thread."""
        self._outbox.put(message)

    def set_state(self, **changes: object) -> None:
        self.state = msgspec.structs.replace(self.state, **changes)
        self.send(self.state)

    def stop(self) -> None:
        self.silent, self._stopping = False, True
        self.send(Stop("test over"))

    def close(self) -> None:
        self._leave.set()
        self._thread.join(60)
        self._socket.close()
        self._authenticator.stop()
        self._context.term()

    def _run(self) -> None:
        next_step = next_state = time.monotonic()
        while not self._leave.is_set():
            wait = max(0.0, next_step - time.monotonic()) if self.open else 0.01
            if self._socket.poll(wait * 1000):
                self._receive()
            now = time.monotonic()
            self._flush()
            if now >= next_state and not self.silent:
                # Sent at once, not through the outbox: a state that waits there is newer.
                next_state = now + 0.5
                self._send_all(self.state)
            if now >= next_step and not self.silent:
                next_step = now + self.step_seconds
                self._advance()

    def _flush(self) -> None:
        while True:
            try:
                message = self._outbox.get_nowait()
            except Empty:
                return
            self._send_all(message)

    def _send_all(self, message: object) -> None:
        frame = encode(message)
        for identity in self._known if isinstance(message, Stop) else self._frontends:
            self._socket.send_multipart([identity, frame])

    def _receive(self) -> None:
        while self._socket.poll(0):
            identity, frame = self._socket.recv_multipart()
            message = self._decode(frame)
            self._known.add(identity)
            if self.silent:
                self._frontends.clear()
                continue
            match message:
                case FrontendHello():
                    self.hellos.append(message)
                    self._frontends.add(identity)
                    self._socket.send_multipart(
                        [identity, encode(Stop("test over") if self._stopping else self.state)]
                    )
                case Submit():
                    self._submit(identity, message)
                case Abort():
                    self.aborts.append(message.handle)
                    self._end(message.handle)
                case Drain():
                    self.drains.append(message)
                case AskTimeline():
                    self.timelines.append(message)
                    if self.ends_timelines:
                        self._socket.send_multipart([identity, encode(TimelineEnd(message.id, ""))])

    def _submit(self, identity: bytes, submit: Submit) -> None:
        self.submits.append(submit)
        if submit.handle in self.open:
            return
        stops = frozenset(array("i", submit.sampling.stop_i32))
        known = len(submit.emitted_i32) // 4
        left = submit.limit - len(submit.prompt_i32) // 4 - known
        items = iter(self.script(submit))
        for _ in range(known):  # scripts that are run again say a token a step
            next(items)
        self.open[submit.handle] = _Running(identity, submit, items, stops, left, known)

    def _end(self, handle: int) -> None:
        running = self.open.pop(handle, None)
        if running is not None:
            self._socket.send_multipart(
                [running.identity, encode(batch(self._step, [(handle, running.sent, [], Finish.ABORT)]))]
            )

    def _score(self, running: _Running) -> None:
        for message in prompt_logprobs(running.submit):
            self._socket.send_multipart([running.identity, encode(message)])

    def _advance(self) -> None:
        """Makes one step: the next item of every open request, one batch per frontend."""
        self._step += 1
        rows: dict[bytes, list[Row]] = {}
        logprobs: dict[bytes, list[HandleLogprobs]] = {}
        fresh: dict[bytes, list[int]] = {}
        for handle, running in list(self.open.items()):
            item = next(running.items, None)
            if isinstance(item, Rejected):
                del self.open[handle]
                self._socket.send_multipart(
                    [running.identity, encode(msgspec.structs.replace(item, handle=handle))]
                )
                continue
            if not running.started:
                running.started = True
                fresh.setdefault(running.identity, []).append(handle)
                self._score(running)
            if item is None and running.left:
                continue
            tokens, finish = _engine(running, item or [])
            rows.setdefault(running.identity, []).append((handle, running.sent, tokens, finish))
            logprobs.setdefault(running.identity, []).extend(_logprobs(running, tokens))
            running.sent += len(tokens)
            if finish:
                del self.open[handle]
        for identity, handles in fresh.items():
            self._socket.send_multipart([identity, encode(started(handles, self.num_cached))])
        for identity, entries in rows.items():
            self._socket.send_multipart(
                [identity, encode(batch(self._step, entries, tuple(logprobs[identity])))]
            )


def _engine(running: _Running, item: list[int] | Finish) -> tuple[list[int], Finish]:
    """Tokens of an item up to the limit or a stop id."""
    if isinstance(item, Finish):
        return [], item
    tokens: list[int] = []
    if not running.left:
        return tokens, Finish.LENGTH
    for token in item:
        tokens.append(token)
        running.left -= 1
        if token in running.stops:
            return tokens, Finish.STOP
        if not running.left:
            return tokens, Finish.LENGTH
    return tokens, Finish.NONE


def _logprobs(running: _Running, tokens: list[int]) -> Iterator[HandleLogprobs]:
    """Chosen token: -0.5. Its alternatives are it and the ids after it: -0.5, -1.5, -2.5, ..."""
    count = running.submit.sampling.num_logprobs
    for index, token in enumerate(tokens if count >= 0 else ()):
        ids = array("i", [token + other for other in range(count)]).tobytes()
        values = struct.pack(f"<{count}f", *(-0.5 - other for other in range(count)))
        yield HandleLogprobs(running.submit.handle, running.sent + index, -0.5, ids, values)


def prompt_logprobs(submit: Submit, each: int = 3) -> Iterator[PromptLogprobs]:
    """``each`` positions a message. A prompt token gets -position / 8 and rank 1; its alternatives
    are it and the ids after it, with that value, 1 less, 2 less, ...
    """
    top, prompt = submit.sampling.num_prompt_logprobs, array("i", submit.prompt_i32).tolist()
    for start in range(1, len(prompt) if top >= 0 else 0, each):
        positions = range(start, min(start + each, len(prompt)))
        ids = array("i", [prompt[at] + other for at in positions for other in range(top)])
        values = array("f", [-at / 8 - other for at in positions for other in range(top)])
        yield PromptLogprobs(
            submit.handle,
            start,
            array("f", [-at / 8 for at in positions]).tobytes(),
            ids.tobytes(),
            values.tobytes(),
            array("i", [1] * len(positions) if submit.sampling.prompt_ranks else []).tobytes(),
        )


def started(handles: list[int], num_cached: int) -> Started:
    """All admitted on data index 0 in epoch 1, never preempted."""
    columns = [array("i", [value] * len(handles)).tobytes() for value in (num_cached, 0, 0, 1)]
    return Started(array("q", handles).tobytes(), *columns)


def batch(step: int, rows: list[Row], logprobs: tuple[HandleLogprobs, ...] = ()) -> TokenBatch:
    """Packs a step's rows of (handle, position of the first token, tokens, finish)."""
    return TokenBatch(
        step=step,
        handles_i64=array("q", [row[0] for row in rows]).tobytes(),
        positions_i32=array("i", [row[1] for row in rows]).tobytes(),
        counts_i32=array("i", [len(row[2]) for row in rows]).tobytes(),
        tokens_i32=array("i", [token for row in rows for token in row[2]]).tobytes(),
        finish_u8=bytes(row[3] for row in rows),
        logprobs=logprobs,
    )
