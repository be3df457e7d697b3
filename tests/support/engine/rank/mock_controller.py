"""The controller's end of a rank's sockets, driven by a test."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import zmq

from lockstep.engine.protocol.bulk import FromRankBulk
from lockstep.engine.protocol.message import encode
from lockstep.engine.protocol.plan import StepPlan
from lockstep.engine.protocol.results import FromRankStep
from lockstep.engine.protocol.sockets import authenticate, new_keypair, server_socket
from lockstep.engine.protocol.specs import Keys, RankSpec
from lockstep.parallel.mesh import Mesh

NO_KEYS = Keys(server_public="", public="", secret="")


def bare_spec(**changes: Any) -> RankSpec:
    """The specification of a rank in a world of one, without addresses and keys."""
    spec = RankSpec(
        rank=0,
        mesh=Mesh(),
        keys=NO_KEYS,
        step_address="",
        bulk_address="",
        store_address="",
        store_keys=NO_KEYS,
        model_path="",
        dtype="fp32",
        keep_fp8=False,
        kv_dtype="fp32",
        page_size=8,
        kv_memory=None,
        ranks_per_host=1,
        max_running=4,
        max_len=128,
        dispatch="local",
        device="cpu",
        threads=1,
    )
    return msgspec.structs.replace(spec, **changes)


class MockController:
    """Two ROUTER sockets with CURVE on free ports of the loopback.

    Receiving fails after ``deadline`` seconds: a rank in its own process may compile kernels before
    its hello.
    """

    def __init__(self, deadline: float = 100.0) -> None:
        self._deadline = deadline
        self._server, self._client = new_keypair(), new_keypair()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._authenticator = authenticate(self._context, (self._client[0],))
        self.sockets = {
            name: server_socket(self._context, zmq.ROUTER, *self._server) for name in ("step", "bulk")
        }
        self.addresses = {
            name: f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}"
            for name, socket in self.sockets.items()
        }
        self._decoders = {
            "step": msgspec.msgpack.Decoder(FromRankStep),
            "bulk": msgspec.msgpack.Decoder(FromRankBulk),
        }

    def spec(self, **changes: Any) -> RankSpec:
        """The specification of a rank in a world of one."""
        keys = Keys(server_public=self._server[0], public=self._client[0], secret=self._client[1])
        step, bulk = self.addresses["step"], self.addresses["bulk"]
        return bare_spec(**({"keys": keys, "step_address": step, "bulk_address": bulk} | changes))

    def receive(self, name: str) -> Any:
        """The next message on ``step`` or ``bulk``."""
        socket = self.sockets[name]
        assert socket.poll(int(1000 * self._deadline)), f"nothing on {name} within {self._deadline} s"
        _, frame = socket.recv_multipart()
        return self._decoders[name].decode(frame)

    def silent(self, name: str, seconds: float = 0.3) -> bool:
        return not self.sockets[name].poll(int(1000 * seconds))

    def send(self, message: Any, rank: int = 0) -> None:
        """Sends a plan on the step socket, any other message on bulk."""
        identity = b"r%d" % rank
        if isinstance(message, StepPlan):
            self.sockets["step"].send_multipart([identity, encode(message.header), encode(message.section)])
        else:
            self.sockets["bulk"].send_multipart([identity, encode(message)])

    def renew(self, name: str) -> None:
        """Drops a socket's connections and accepts new ones at the same address."""
        self.sockets[name].close(linger=0)
        self.sockets[name] = server_socket(self._context, zmq.ROUTER, *self._server)
        end = time.monotonic() + self._deadline
        while True:
            try:
                self.sockets[name].bind(self.addresses[name])
                return
            except zmq.ZMQError:  # the old socket closes in a thread of its own
                assert time.monotonic() < end, f"{self.addresses[name]} does not become free"
                time.sleep(0.01)

    def unbind(self) -> None:
        """Ends all connections and accepts no more, as a controller that dies."""
        for socket in self.sockets.values():
            socket.close(linger=0)

    def close(self) -> None:
        self.unbind()
        self._authenticator.stop()
        self._context.term()
