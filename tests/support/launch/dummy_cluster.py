"""Dummy controller, rank and frontend: they speak the real protocols and do no work.

``python -m support.launch.dummy_cluster ROLE INDEX PARENT`` runs one under the real entry point.
The text in the environment variable ``DUMMY`` makes them misbehave: ``rank 1: fail``, ``rank 1:
die``, ``rank 1: silent``, ``rank 1: wait``, ``controller 0: die``, ``controller 0: undrained``,
``frontend 0: 503``, ``rank 0: deaf`` (ignores Stop and SIGTERM). A rank raises on SIGUSR1, and
is spent on SIGUSR2.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import zmq

from lockstep.engine.frontend.connections import ENDED, OPEN, TAKEN
from lockstep.engine.protocol.cluster_state import ClusterState
from lockstep.engine.protocol.frontends import Drain, FromFrontend, FrontendHello
from lockstep.engine.protocol.lobby import Lobby
from lockstep.engine.protocol.message import Stop, encode
from lockstep.engine.protocol.sockets import authenticate, client_socket, server_socket
from lockstep.engine.protocol.specs import ControllerSpec, FrontendSpec, RankSpec
from lockstep.launch.cluster import entry as process
from lockstep.parallel.recovery import ProcessSpent


def ordered(role: str, index: int) -> str:
    """The fault that this process was told to have."""
    who, _, what = os.environ.get("DUMMY", "").partition(":")
    return what.strip() if who == f"{role} {index}" else ""


def state(phase: str) -> bytes:
    zeros: Any = dict.fromkeys(
        ("epoch", "step", "num_running", "num_waiting", "prompt_tokens", "generation_tokens"), 0
    )
    rest = {
        "prefix_queries": 0,
        "prefix_hits": 0,
        "preemptions": 0,
        "steps": 0,
        "imbalance": 1.0,
        "plan_seconds": 0.0,
        "kv_usage": 0.0,
    }
    return encode(
        ClusterState(phase=phase, reason="", max_len=16, page_size=4, prefix_caching=True, **zeros, **rest)
    )


def controller(spec: ControllerSpec) -> None:
    lobby = Lobby(spec.lobby, "controller", 0)
    if ordered("controller", 0) == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    gate = authenticate(context, spec.allowed)
    socket = server_socket(context, zmq.ROUTER, spec.public, spec.secret)
    address = f"tcp://{spec.host}:{socket.bind_to_random_port(f'tcp://{spec.host}')}"
    lobby.report("ready", address=(address, address, address))
    peers, phase, decoder = set(), "serving", msgspec.msgpack.Decoder(FromFrontend)
    while phase != "stop":
        if socket.poll(100):
            peer, payload = socket.recv_multipart()
            message = decoder.decode(payload) if payload else None
            peers.add(peer)
            if isinstance(message, Drain) and ordered("controller", 0) != "undrained":
                phase = "drained"
            if isinstance(message, Stop):
                phase = "stop"
            if isinstance(message, FrontendHello) and ordered("controller", 0) == "die later":
                threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGKILL)).start()
        for peer in peers:
            socket.send_multipart([peer, encode(Stop()) if phase == "stop" else state(phase)])
    socket.close(linger=500)
    gate.stop()
    context.term()


def join(address: str, keys: Any, name: bytes) -> Callable[[], None]:
    """Says hello to the controller; returns a function that waits for its Stop."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = client_socket(context, zmq.DEALER, keys, name)
    socket.connect(address)
    socket.send(b"")

    def until_stopped() -> None:
        stop = encode(Stop())
        while socket.recv() != stop:
            pass
        socket.close()
        context.term()

    return until_stopped


def raise_in_a_step(number: int, frame: object) -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def is_spent(number: int, frame: Any) -> None:
    raise ProcessSpent("the epoch has ended, and symmetric memory serves one only")


def rank(spec: RankSpec) -> None:
    lobby, order = Lobby(spec.lobby, "rank", spec.rank), ordered("rank", spec.rank)
    lobby.report("loading", fraction=0.5)
    if order == "fail":
        raise ValueError("model.safetensors: truncated: 3 bytes")
    if order == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if order == "wait":
        time.sleep(600)
    if order == "silent":
        os._exit(0)
    signal.signal(signal.SIGUSR1, raise_in_a_step)
    signal.signal(signal.SIGUSR2, is_spent)
    lobby.report("ready")
    if order == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    join(spec.step_address, spec.keys, b"r%d" % spec.rank)()


def frontend(spec: FrontendSpec) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            refused = ordered("frontend", 0) == "503"
            known = not spec.api_keys or self.headers["Authorization"] == f"Bearer {spec.api_keys[0]}"
            self.send_response(503 if refused else 200 if known else 401)
            self.end_headers()
            self.wfile.write(json.dumps({"error": {"message": "no"}}).encode())

        def log_message(self, *args: object) -> None:
            pass

    line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    line.connect(b"\0" + spec.acceptor.address.encode())
    line.send(f"{spec.acceptor.token} {spec.index}".encode())
    board = socket.recv_fds(line, 64, 1)[1]
    assert len(board) == 1, "the shared board comes first"
    line.send(OPEN)

    def take() -> None:
        while found := socket.recv_fds(line, 64, 1)[1]:
            line.send(TAKEN)
            threading.Thread(target=answer, args=(socket.socket(fileno=found[0]),), daemon=True).start()

    def answer(connection: socket.socket) -> None:
        Handler(connection, connection.getpeername(), None)  # type: ignore[arg-type]
        connection.close()
        with contextlib.suppress(OSError):  # the launcher has left
            line.send(ENDED)

    until_stopped = join(spec.address, spec.keys, spec.name.encode())
    threading.Thread(target=take, daemon=True).start()
    with Lobby(spec.lobby, "frontend", spec.index) as lobby:
        lobby.report("ready")
    until_stopped()


def main() -> None:
    """Runs one role through the real entry point, with the module of the role replaced."""
    here = SimpleNamespace(controller=controller, rank=rank, frontend=frontend)
    sys.modules[f"lockstep.{process.ROLES[sys.argv[1]][0]}"] = SimpleNamespace(
        main=getattr(here, sys.argv[1])
    )  # type: ignore[assignment]
    process.main()


if __name__ == "__main__":
    main()
