"""The store in which ranks form their groups for an epoch. It runs in the launcher, so it outlives
them.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from dataclasses import dataclass

import msgspec
import zmq

from ...engine.protocol.meeting import (
    AddValue,
    Answer,
    DropValue,
    FetchValues,
    PutValue,
    SwapValue,
    ToMeeting,
)
from ...engine.protocol.message import encode
from ...engine.protocol.sockets import authenticate, keep_watch, server_socket


@dataclass(frozen=True)
class _Waiting:
    """A query some of whose keys are missing. ``until``: monotonic seconds."""

    question: FetchValues
    until: float


class Rendezvous:
    """Serves keys and values on a CURVE socket of ``host``, in a thread, to holders of ``allowed``
    keys only.
    """

    def __init__(self, host: str, public: str, secret: str, allowed: tuple[str, ...]) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._gate = authenticate(self._context, allowed)
        self._socket = server_socket(self._context, zmq.ROUTER, public, secret)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        keep_watch(self._socket)
        self.address = f"tcp://{host}:{self._socket.bind_to_random_port(f'tcp://{host}')}"
        self._end, self._ended = (self._context.socket(zmq.PAIR) for _ in range(2))
        self._ended.bind("inproc://end")
        self._end.connect("inproc://end")
        self._decoder = msgspec.msgpack.Decoder(ToMeeting)
        self._values: dict[str, bytes] = {}
        self._waiting: dict[bytes, _Waiting] = {}  # by asker; a later question replaces an earlier one
        self._thread = threading.Thread(target=self._run, name="rendezvous", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops answering and closes the socket. Closing twice is harmless."""
        if self._context.closed:
            return
        self._end.send(b"")
        self._thread.join()
        for socket in (self._end, self._ended, self._socket):
            socket.close(linger=0)
        self._gate.stop()
        self._context.term()

    # ----------------------------------------------------------------- the thread

    def _run(self) -> None:
        poller = zmq.Poller()
        for socket in (self._socket, self._ended):
            poller.register(socket, zmq.POLLIN)
        while True:
            ready = dict(poller.poll(self._milliseconds()))
            if self._ended in ready:
                return
            if self._socket in ready:
                self._hear()
            self._answer_waiting()

    def _milliseconds(self) -> int | None:
        """Time until the first question must be answered."""
        if not self._waiting:
            return None
        left = min(waiting.until for waiting in self._waiting.values()) - time.monotonic()
        return max(0, math.ceil(1000 * left))

    def _hear(self) -> None:
        frames = self._socket.recv_multipart()
        try:
            asker, question = frames[0], self._decoder.decode(frames[-1])
            answer = self._answer(question)
        except (msgspec.DecodeError, ValueError):
            return  # malformed, so not from our ranks: no answer
        self._waiting.pop(asker, None)
        if answer is None:
            assert isinstance(question, FetchValues)
            self._waiting[asker] = _Waiting(question, time.monotonic() + question.patience)
        else:
            self._send(asker, answer)

    def _answer(self, question: ToMeeting) -> Answer | None:
        """The answer; None while keys are missing that the asker waits for."""
        values, number = self._values, question.number
        if isinstance(question, FetchValues):
            found = tuple(values.get(key) for key in question.keys)
            return None if None in found and question.patience > 0 else Answer(number, found)
        if isinstance(question, PutValue):
            values[question.key] = question.value
            return Answer(number)
        if isinstance(question, AddValue):
            values[question.key] = b"%d" % (int(values.get(question.key, b"0")) + question.amount)
            return Answer(number, (values[question.key],))
        if isinstance(question, SwapValue):
            if values.get(question.key, b"") == question.expected:
                values[question.key] = question.desired
            return Answer(number, (values.get(question.key, question.expected),))
        assert isinstance(question, DropValue)
        return Answer(number, (values.pop(question.key, None),))

    def _answer_waiting(self) -> None:
        """Answers questions whose keys are all there, and those that have waited long enough."""
        now = time.monotonic()
        for asker, waiting in list(self._waiting.items()):
            answer = self._answer(waiting.question)
            if answer is None and now >= waiting.until:
                answer = self._answer(msgspec.structs.replace(waiting.question, patience=0.0))
            if answer is not None:
                del self._waiting[asker]
                self._send(asker, answer)

    def _send(self, asker: bytes, answer: Answer) -> None:
        with contextlib.suppress(zmq.ZMQError):  # the asker has gone
            self._socket.send_multipart((asker, encode(answer)), zmq.DONTWAIT)
