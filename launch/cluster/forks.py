"""The client of a fork server: starts it, has processes forked, and learns of their ends."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec

from ..environment import child_environment
from .cluster import Imports, Task
from .fork_server import Ended, Forked, ForkTask, NotForked, Release
from .process import Process, open_log, tail_of

_news = msgspec.msgpack.Decoder(Forked | Ended | NotForked)


class Forks:
    """Processes that one fork server starts. The server has ``imports``, and ``settings`` in its
    environment too. When it ends, so do they.
    """

    def __init__(self, imports: Imports, settings: Mapping[str, str], log_dir: Path) -> None:
        self._module = imports.module
        self._settings = {**settings, **imports.environment}
        self._log = log_dir / f"fork-server-{socket.gethostname()}.log"  # hosts may share the folder
        self._numbers = itertools.count()
        self._processes: dict[int, Process] = {}  # running processes, by the number of the request
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        ours, self._theirs = socket.socketpair()
        self._line = Connection(ours.detach())
        self._server: Future[subprocess.Popen[bytes]] = Future()
        self.ended = threading.Event()
        self._name = "the fork server"
        # The server dies with the thread that starts it, so that thread stays.
        threading.Thread(target=self._run, name="fork server", daemon=True).start()

    def start(self, task: Task, settings: Mapping[str, str], process: Process) -> None:
        """Starts ``task`` with ``settings`` in its environment. May block until the server has done
        its imports.
        """
        number = next(self._numbers)
        with self._lock:
            self._processes[number] = process
        log = str(process.log)
        request = ForkTask(number, task.module, task.role, task.index, log, dict(settings), task.spec)
        try:
            self._send(request)
        except OSError:  # the server has ended
            self.ended.wait()
            self._lose()

    def kill(self) -> None:
        with contextlib.suppress(OSError):  # it could not be started
            self._server.result().kill()

    def _send(self, request: ForkTask | Release) -> None:
        with self._sending:
            self._line.send_bytes(msgspec.msgpack.encode(request))

    def _run(self) -> None:
        command = [sys.executable, "-P", "-m", "lockstep.launch.cluster.fork_server"]
        try:
            with os.fdopen(open_log(self._log), "ab") as output, self._theirs:
                server = subprocess.Popen(
                    [*command, self._module, str(os.getpid())],
                    stdin=self._theirs.fileno(),
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd=self._log.parent,
                    env=child_environment(self._settings),
                    start_new_session=True,
                )
            self._name = f"the fork server on {socket.gethostname()} (pid {server.pid})"
            self._server.set_result(server)
            self._listen()
            server.wait()
        except OSError as error:
            self._server.set_exception(error)
        finally:
            self.ended.set()
            self._lose()

    def _listen(self) -> None:
        """Takes reports until the server has ended."""
        while True:
            try:
                news = _news.decode(self._line.recv_bytes())
            except (EOFError, OSError):
                return
            with self._lock:
                process = self._processes[news.number]
                if not isinstance(news, Forked):
                    del self._processes[news.number]
            if isinstance(news, Forked):
                process.started.set_result(news.pid)
            elif isinstance(news, NotForked):
                process.start_failed(OSError(f"the host starts no more processes: {news.reason}"))
            else:
                process.end(news.code, functools.partial(self._release, process.started.result()))

    def _release(self, pid: int) -> None:
        with contextlib.suppress(OSError):  # the server has ended and was reaped
            self._send(Release(pid))

    def _lose(self) -> None:
        """Reports the server's processes as lost: it has ended, so the kernel kills them."""
        with self._lock:
            lost = list(self._processes.values())
            self._processes.clear()
        lines = tail_of(self._log).splitlines()
        for process in lost:
            if process.started.done():
                process.lose(self._name)
            else:
                last = lines[-1] if lines else "it wrote nothing"
                process.start_failed(OSError(f"the fork server has ended; its last line: {last}"))
