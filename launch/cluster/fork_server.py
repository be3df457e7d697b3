"""The fork server: imports the modules of a host's ranks once, and forks the ranks.

PyTorch and the rest take a second or two of CPU time to import. Forked ranks, replacements too,
start in a few milliseconds and share the memory of these modules. Nothing but imports runs here, so
that a fork finds no device, no communicator and no thread that holds a lock. No garbage is
collected either: next to all of it stays.

``python -m lockstep.launch.cluster.fork_server MODULE PARENT_PID`` imports MODULE; standard input
is a Unix socket for requests and reports. Its ranks end with it.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
import select
import signal
import sys
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

import msgspec
import setproctitle

from ..log_lines import log_to_stderr
from .entry import leave_with_parent, status_of
from .process import exit_status, open_log


class ForkTask(msgspec.Struct, tag=True):
    """Start ``python -m MODULE ROLE INDEX`` with ``spec``: request ``number``."""

    number: int
    module: str
    role: str
    index: int
    log: str
    environment: dict[str, str]
    spec: bytes


class Release(msgspec.Struct, tag=True):
    """Acknowledges the end of ``pid``: the system may reuse its id."""

    pid: int


class Forked(msgspec.Struct, tag=True):
    """Request ``number`` runs as ``pid``."""

    number: int
    pid: int


class Ended(msgspec.Struct, tag=True):
    """The process of request ``number`` has ended. ``code``: exit status, negative for a signal."""

    number: int
    code: int


class NotForked(msgspec.Struct, tag=True):
    """The system did not fork for request ``number``."""

    number: int
    reason: str


_LOG = logging.getLogger("lockstep.process")
_requests = msgspec.msgpack.Decoder(ForkTask | Release)


class _Server:
    """``line`` connects to the launcher, or to its actor on this host."""

    def __init__(self, line: Connection) -> None:
        self._line = line
        self._running: dict[int, int] = {}  # request by pid, of processes whose end was not reported
        self._woken, self._waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)

    def serve(self) -> NoReturn:
        """Serves until the other end of the line closes."""
        while True:
            ready, _, _ = select.select([self._line.fileno(), self._woken], [], [])
            if self._woken in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._woken, 1024)
                self._tell_ends()
            if self._line.fileno() in ready:
                try:
                    request = _requests.decode(self._line.recv_bytes())
                except (EOFError, ConnectionResetError):
                    os._exit(0)
                if isinstance(request, ForkTask):
                    self._fork(request)
                else:
                    os.waitpid(request.pid, 0)

    def _fork(self, request: ForkTask) -> None:
        try:
            pid = os.fork()
        except OSError as error:
            self._tell(NotForked(request.number, str(error)))
            return
        if pid == 0:
            self._become(request)
        self._running[pid] = request.number
        self._tell(Forked(request.number, pid))

    def _tell_ends(self) -> None:
        for pid, number in list(self._running.items()):
            code = exit_status(pid, wait=False)
            if code is not None:
                del self._running[pid]
                self._tell(Ended(number, code))

    def _tell(self, news: Forked | Ended | NotForked) -> None:
        with contextlib.suppress(BrokenPipeError):  # the next read ends this process
            self._line.send_bytes(msgspec.msgpack.encode(news))

    def _become(self, request: ForkTask) -> NoReturn:
        """Makes this forked process what a new interpreter would be."""
        parent = os.getppid()
        try:
            os.setsid()
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._line.close()
            for descriptor in (self._woken, self._waker):
                os.close(descriptor)
            nothing = os.open(os.devnull, os.O_RDONLY)
            log = open_log(Path(request.log))
            for source, target in ((nothing, 0), (log, 1), (log, 2)):
                os.dup2(source, target)
            os.close(nothing)
            os.close(log)
            os.environ.update(request.environment)
            name = request.module, request.role, str(request.index)
            setproctitle.setproctitle(" ".join((sys.executable, "-P", "-m", *name, str(parent))))
            run = importlib.import_module(request.module).run
            run(request.role, request.index, parent, lambda: request.spec)
            code = 0
        except SystemExit as leave:
            code = status_of(leave)
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> NoReturn:
    setproctitle.getproctitle()  # finds the arguments while the first variable lies behind them
    module, parent = sys.argv[1], int(sys.argv[2])
    leave_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the launcher's to handle
    log_to_stderr("fork-server")
    line = Connection(os.dup(0))
    begin = time.monotonic()
    gc.disable()
    importlib.import_module(module)
    _LOG.info("has imported %s in %.1f s, with process id %d", module, time.monotonic() - begin, os.getpid())
    gc.freeze()  # collections in a fork leave the shared pages alone
    _Server(line).serve()


if __name__ == "__main__":
    main()
