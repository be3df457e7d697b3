"""The controller's three sockets: steps and bulk for ranks, one for frontends and the launcher."""

from __future__ import annotations

import math
from typing import TypeVar

import msgspec
import zmq

from ..planner.group_plan import GroupPlan
from ..protocol.bulk import Disband, FromRankBulk
from ..protocol.frontends import FromFrontend
from ..protocol.message import Message, Stop, encode
from ..protocol.results import FromRankStep
from ..protocol.sockets import (
    authenticate,
    bind_when_free,
    keep_watch,
    pulse_identity,
    rank_identity,
    server_socket,
)
from ..protocol.specs import ControllerSpec

T = TypeVar("T")

_MAX_DRAIN = 4096
# Members of an enumeration cost a conversion at every call.
_EVENTS = int(zmq.EVENTS)
_POLLIN = int(zmq.POLLIN)
_RCVMORE = int(zmq.RCVMORE)
_DONTWAIT = int(zmq.DONTWAIT)
BIND_SECONDS = 20.0


class Transport:
    """Binds three ROUTER sockets on ``spec.host`` and moves messages; for one thread only. Raises
    OSError when the addresses of a predecessor stay in use.

    Messages are sent and received frame by frame: the multipart calls of pyzmq check every frame,
    which nearly doubles the cost.

    ``addresses`` are those of the step, bulk and frontend sockets.
    """

    def __init__(self, spec: ControllerSpec) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._authenticator = authenticate(self._context, spec.allowed)
        sockets = [server_socket(self._context, zmq.ROUTER, spec.public, spec.secret) for _ in range(3)]
        self._step, self._bulk, self._frontend = sockets
        for socket in sockets:
            # A second connection of the same name is the same peer, back after a broken link.
            socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
            keep_watch(socket)
        self.addresses = _bind(sockets, spec)
        self._poller = zmq.Poller()
        for socket in sockets:
            self._poller.register(socket, zmq.POLLIN)
        self._ready: set[zmq.Socket[bytes]] = set()
        self._from_rank_step = msgspec.msgpack.Decoder(FromRankStep)
        self._from_rank_bulk = msgspec.msgpack.Decoder(FromRankBulk)
        self._from_frontend = msgspec.msgpack.Decoder(FromFrontend)
        self._identities: list[bytes] = [rank_identity(rank) for rank in range(spec.mesh.world)]
        self._members = [
            [self._identities[rank] for rank in spec.mesh.members(data)] for data in range(spec.mesh.data)
        ]

    def wait(self, seconds: float) -> None:
        """Returns when a message is there, or after ``seconds``. The methods below read only the
        sockets that had one by then.
        """
        milliseconds = math.ceil(min(max(0.0, seconds), 60.0) * 1000)
        self._ready = {socket for socket, _ in self._poller.poll(milliseconds)}

    def step_messages(self) -> list[FromRankStep]:
        """All step results that have arrived."""
        return [self._from_rank_step.decode(body) for _, body in self._drain(self._step)]

    def bulk_messages(self) -> list[FromRankBulk]:
        """All hellos, staging acknowledgements and signs of progress that have arrived."""
        return [self._from_rank_bulk.decode(body) for _, body in self._drain(self._bulk)]

    def frontend_messages(self) -> list[tuple[bytes, FromFrontend]]:
        """All messages of frontends and of the launcher, with their senders' names."""
        return [(name, self._from_frontend.decode(body)) for name, body in self._drain(self._frontend)]

    def send_plan(self, plan: GroupPlan) -> int:
        """Sends each section to the members of its data index. Returns the most bytes that one rank
        got.
        """
        header, send, largest = encode(plan.header), self._step.send, 0
        for data, section in plan.sections.items():
            body = encode(section)
            largest = max(largest, len(body))
            for identity in self._members[data]:
                send(identity, zmq.SNDMORE)
                send(header, zmq.SNDMORE)
                send(body)
        return len(header) + largest

    def send_bulk(self, rank: int, message: Message) -> None:
        _send(self._bulk, self._identities[rank], message)

    def send_pulse(self, rank: int, message: Stop | Disband) -> None:
        """Sends to the thread of a rank that no step blocks."""
        _send(self._bulk, pulse_identity(rank), message)

    def send_frontend(self, name: bytes, message: Message) -> None:
        """Sends to a peer of the third socket. One that has gone is ignored; its lease will end."""
        _send(self._frontend, name, message)

    def close(self) -> None:
        """Closes everything; the last messages have a second to leave."""
        for socket in (self._step, self._bulk, self._frontend):
            socket.close(linger=1000)
        self._authenticator.stop()
        self._context.term()

    def _drain(self, socket: zmq.Socket[bytes]) -> list[tuple[bytes, bytes]]:
        """Reads (sender, message) until the socket is empty. Asking it costs a tenth of catching
        its exception.
        """
        received: list[tuple[bytes, bytes]] = []
        if socket in self._ready:
            ask, receive = socket.getsockopt, socket.recv
            while int(ask(_EVENTS)) & _POLLIN and len(received) < _MAX_DRAIN:
                received.append((receive(_DONTWAIT), receive(_DONTWAIT)))
                while ask(_RCVMORE):  # messages have one frame: the rest of this one is none of ours
                    receive(_DONTWAIT)
        return received


def _send(socket: zmq.Socket[bytes], name: bytes, message: Message) -> None:
    socket.send(name, zmq.SNDMORE | zmq.DONTWAIT)
    socket.send(encode(message), zmq.DONTWAIT)


def _bind(sockets: list[zmq.Socket[bytes]], spec: ControllerSpec) -> tuple[str, ...]:
    """Binds ``sockets`` to free ports, or to the addresses that peers of a predecessor know.
    Retries these until the kernel has freed the ports, also from a peer's TCP self-connect.
    """
    if spec.succession is None:
        return tuple(
            f"tcp://{spec.host}:{socket.bind_to_random_port(f'tcp://{spec.host}')}" for socket in sockets
        )
    for socket, address in zip(sockets, spec.succession.addresses, strict=True):
        bind_when_free(socket, address, BIND_SECONDS, "address")
    return spec.succession.addresses
