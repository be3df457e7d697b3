"""The frontend process: starts the service and its HTTP server, and leaves when it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator

import uvicorn
import uvloop

from ..lobby import Lobby
from ..specs import FrontendSpec
from .app import build_app
from .service import Service

BACKLOG = 2048
KEEP_ALIVE_SECONDS = 75
GRACE_SECONDS = 5
PARENT_CHECK_SECONDS = 1.0
_log = logging.getLogger("lockstep.frontend")


class _Server(uvicorn.Server):
    """uvicorn without signal handlers: the process decides when to leave."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def main(spec: FrontendSpec) -> None:
    """Serves until SIGTERM, a Stop from the controller, or the end of the parent process. Raises ValueError for a bad spec."""
    digits = "".join(filter(str.isdigit, spec.name))
    with Lobby(spec.lobby, "frontend", int(digits or 0)) as lobby:
        lobby.report("starting", "loading the tokenizer")
        try:
            listener = listen(spec.host, spec.port, spec.share_port)
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(_serve(spec, listener, lobby))
        except Exception as error:
            lobby.report("failed", f"{type(error).__name__}: {error}")
            raise
        lobby.report("stopped")


def listen(host: str, port: int, share: bool) -> socket.socket:
    """A bound socket. Raises ValueError where the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if share:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ValueError(f"frontend: cannot listen on {host}:{port}: {error.strerror}") from error
    return listener


async def _serve(spec: FrontendSpec, listener: socket.socket, lobby: Lobby) -> None:
    leave = asyncio.Event()
    service = Service(spec, on_stop=lambda reason: leave.set())
    config = uvicorn.Config(
        build_app(service),
        http="httptools",
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    server = _Server(config)
    loop = asyncio.get_running_loop()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole process group; the launcher decides
        loop.add_signal_handler(signal.SIGTERM, leave.set)
    service.start()
    running = asyncio.create_task(server.serve([listener]))
    watching = asyncio.create_task(_watch_parent(leave))
    leaving = asyncio.create_task(leave.wait())
    try:
        while not server.started and not running.done():
            await asyncio.sleep(0.01)
        host, port = listener.getsockname()[:2]
        lobby.report("ready", address=(f"http://{f'[{host}]' if ':' in host else host}:{port}",))
        gc.collect()
        gc.freeze()
        await asyncio.wait((running, leaving), return_when=asyncio.FIRST_COMPLETED)
    finally:
        watching.cancel()
        leaving.cancel()
        service.close()  # ends open streams with an error, so that the server need not wait for them
        server.should_exit = True
        await running


async def _watch_parent(leave: asyncio.Event) -> None:
    """A child whose launcher has died leaves too."""
    parent = os.getppid()
    while os.getppid() == parent:
        await asyncio.sleep(PARENT_CHECK_SECONDS)
    _log.error("the parent process %d has died: leaving", parent)
    leave.set()
