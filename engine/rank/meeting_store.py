"""A rank's connection to the store where the ranks of a group meet for an epoch."""

from __future__ import annotations

import functools
import itertools
import threading
import time
from datetime import timedelta

import msgspec
import zmq
from torch._C._distributed_c10d import Store

from ..protocol.meeting import AddValue, Answer, DropValue, FetchValues, PutValue, SwapValue, ToMeeting
from ..protocol.message import encode
from ..protocol.sockets import client_socket, keep_watch, rank_identity
from ..protocol.specs import RankSpec

_PATIENCE = 0.5  # seconds that the other side holds a question; other threads wait for no longer


class MeetingError(RuntimeError):
    """The meeting point did not answer in time, or a peer left no value there."""


class MeetingStore(Store):
    """Keys and values for gloo and NCCL, over an encrypted connection to the launcher.

    Used by ``Collectives.build`` and by threads of NCCL. Every question has ``deadline`` seconds;
    MeetingError names the wait.
    """

    def __init__(self, spec: RankSpec, deadline: float) -> None:
        super().__init__()
        self._spec = spec
        self._address = spec.store_address
        self._deadline = deadline
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._decoder = msgspec.msgpack.Decoder(Answer)
        self.set_timeout(timedelta(seconds=deadline))

    def close(self) -> None:
        """Closes the connection; a later question makes another."""
        with self._lock:
            socket: zmq.Socket[bytes] | None = self.__dict__.pop("_socket", None)
            if socket is not None:
                socket.close(linger=0)
                socket.context.term()

    # ----------------------------------------------------------------- torch's interface

    def set(self, key: str, value: bytes | str) -> None:
        data = value.encode() if isinstance(value, str) else bytes(value)
        self._ask(PutValue(next(self._numbers), key, data))

    def get(self, key: str) -> bytes:
        return self._fetch([key], self._deadline)[0]

    def add(self, key: str, amount: int) -> int:
        return int(self._value(AddValue(next(self._numbers), key, amount)))

    def compare_set(self, key: str, expected: bytes | str, desired: bytes | str) -> bytes:
        old, new = (
            value.encode() if isinstance(value, str) else bytes(value) for value in (expected, desired)
        )
        return self._value(SwapValue(next(self._numbers), key, old, new))

    def check(self, keys: list[str]) -> bool:
        return None not in self._ask(FetchValues(next(self._numbers), tuple(keys))).values

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        self._fetch(keys, self._deadline if timeout is None else timeout.total_seconds())

    def delete_key(self, key: str) -> bool:
        return self._ask(DropValue(next(self._numbers), key)).values[0] is not None

    deleteKey = delete_key  # the name that torch's C++ calls

    def clone(self) -> Store:
        """The same connection: it may be used from several threads."""
        return self

    # ----------------------------------------------------------------- the connection

    @functools.cached_property
    def _socket(self) -> zmq.Socket[bytes]:
        """The connection, made for the first question."""
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        socket = client_socket(context, zmq.DEALER, self._spec.store_keys, rank_identity(self._spec.rank))
        keep_watch(socket)
        socket.connect(self._address)
        return socket

    def _value(self, question: AddValue | SwapValue) -> bytes:
        [value] = self._ask(question).values
        assert value is not None
        return value

    def _fetch(self, keys: list[str], seconds: float) -> list[bytes]:
        """The values of keys, waiting until all are there."""
        end = time.monotonic() + seconds
        while True:
            left = end - time.monotonic()
            question = FetchValues(next(self._numbers), tuple(keys), max(0.0, min(left, _PATIENCE)))
            values = self._ask(question).values
            found = [value for value in values if value is not None]
            if len(found) == len(keys):
                return found
            if left <= 0:
                missing = ", ".join(key for key, value in zip(keys, values, strict=True) if value is None)
                raise MeetingError(f"no value of {missing} at {self._address} within {seconds:g} s")

    def _ask(self, question: ToMeeting) -> Answer:
        with self._lock:
            self._socket.send(encode(question))
            end = time.monotonic() + self._deadline
            while self._socket.poll(max(0, int(1000 * (end - time.monotonic())))):
                answer = self._decoder.decode(self._socket.recv())
                if answer.number == question.number:  # not one that came too late for its question
                    return answer
        raise MeetingError(f"no answer from the store at {self._address} within {self._deadline:g} s")
