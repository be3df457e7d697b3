"""The frontend process: runs the service and its HTTP server until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator

import msgspec
import uvicorn
import uvloop

from ..protocol.lobby import Lobby
from ..protocol.specs import FrontendSpec
from .connections import Intake, connect
from .http.app import build_app
from .http.connection import Connection
from .http.entrance import Entrance
from .http.observers import observe
from .metrics.shared_counters import SharedCounters
from .requests.model import ServedModel, load_model
from .service import Service

GRACE_SECONDS = 5
OWN_DESCRIPTORS = 64  # used by the process itself, in addition to connections
SWITCH_SECONDS = 0.0005  # the loop waits so long, not 5 ms, for each thread that prepares a request
COLLECT_EVERY = 20_000  # objects; at 700, collections double the time of parsing large conversations
PARENT_CHECK_SECONDS = 1.0
HEARD_SECONDS = 2.0
_log = logging.getLogger("lockstep.frontend")


class _Server(uvicorn.Server):
    """uvicorn without signal handlers: the process decides when to stop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def main(spec: FrontendSpec) -> None:
    """Serves until SIGTERM, a Stop from the controller, or the end of the parent process. Raises
    ValueError for a bad spec.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    with Lobby(spec.lobby, "frontend", spec.index) as lobby:
        lobby.report("starting", "loading the tokenizer")
        spec = _within_descriptors(spec)
        model = load_model(spec)
        line, shared = connect(spec.acceptor, spec.index)
        with line, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(spec, model, shared, line, lobby))
        lobby.report("stopped")


def _within_descriptors(spec: FrontendSpec) -> FrontendSpec:
    """Raises the soft limit of descriptors, one for each connection, and lowers ``max_connections``
    where the hard limit allows fewer.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    asked, room = spec.limits.max_connections, most - OWN_DESCRIPTORS
    if most == resource.RLIM_INFINITY or asked <= room:
        return spec
    _log.warning(
        "frontend.max_connections is %d here, not %d: the limit of open files is %d", room, asked, most
    )
    return msgspec.structs.replace(spec, limits=msgspec.structs.replace(spec.limits, max_connections=room))


async def _serve(
    spec: FrontendSpec, model: ServedModel, shared: SharedCounters, line: socket.socket, lobby: Lobby
) -> None:
    loop = asyncio.get_running_loop()
    leave = asyncio.Event()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the group; the launcher decides
        loop.add_signal_handler(signal.SIGTERM, leave.set)
    service = Service(spec, model, shared, on_stop=leave.set)
    service.grammars.start()
    observers = observe(spec, service.metrics)
    config = uvicorn.Config(
        build_app(service, observers),
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,  # its lines go where ours go
        log_level="warning",
        access_log=False,
        server_header=False,
        # Annotated as int, used as seconds.
        timeout_keep_alive=spec.limits.idle_deadline,  # type: ignore[arg-type]
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    server = _Server(config)
    entrance = Entrance(spec.limits)
    running = asyncio.create_task(server.serve([]))
    watching = asyncio.create_task(_watch_parent(leave))
    leaving = asyncio.create_task(leave.wait())

    def make_connection(on_end: Callable[[], None]) -> Connection:
        return Connection(config, server.server_state, loop, entrance=entrance, on_end=on_end)

    try:
        while not server.started and not running.done():
            await asyncio.sleep(0.01)
        await service.wait_heard(HEARD_SECONDS)  # else a restarted one would answer /health with 503
        with contextlib.closing(Intake(line, make_connection)):
            lobby.report("ready")
            gc.collect()
            gc.freeze()
            gc.set_threshold(COLLECT_EVERY, *gc.get_threshold()[1:])
            await asyncio.wait((running, leaving), return_when=asyncio.FIRST_COMPLETED)
    finally:
        watching.cancel()
        leaving.cancel()
        service.close()  # ends open streams with an error, so that the server need not wait for them
        server.should_exit = True
        await running
        if observers is not None:
            observers.close()


async def _watch_parent(leave: asyncio.Event) -> None:
    """Sets ``leave`` when the launcher, our parent, has died."""
    parent = os.getppid()
    while os.getppid() == parent:
        await asyncio.sleep(PARENT_CHECK_SECONDS)
    _log.error("the parent process %d has died: leaving", parent)
    leave.set()
