"""The grammar keeper: a process that forks a child for each check of grammars.

Compiling a grammar may never end, or take all memory; only killing the process stops that. The
keeper has loaded the model's vocabulary, so a child begins at once, and limits of its own end it:
CPU time and memory. The frontend sends the end of a socket for every check and closes its own end
when nobody waits for the answer any more; the keeper then kills the child. It ends with the
frontend.

Messages of a check: the frontend sends the grammars, the child answers with the fault of each,
empty for none, up to the first that has one. Where a child dies, the keeper sends the signal.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
import traceback
from pathlib import Path

import msgspec

from ...text.vocabulary import load_vocabulary
from .trial import Trial

READY = b"ready"
LENGTH = struct.Struct("!I")
NICE_AFTER = 0.1
NICENESS = 5


class KeeperSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Parameters of a keeper. ``seconds`` of CPU and bytes of ``memory`` bound each check."""

    model_path: str
    vocab_size: int
    eos_ids: tuple[int, ...]
    seconds: float
    memory: int


class _Keeper:
    """Starts children, kills those that nobody waits for, and reports deaths."""

    def __init__(self, spec: KeeperSpec, trial: Trial, control: socket.socket) -> None:
        self._spec = spec
        self._trial = trial
        self._control = control
        self._poll = select.poll()
        self._lines: dict[int, socket.socket] = {}  # by pid
        self._young: dict[int, float] = {}  # pids whose priority is still the usual one, since when
        self._deaths, wake = os.pipe()
        os.set_blocking(wake, False)
        os.set_blocking(self._deaths, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._poll.register(control, select.POLLIN)
        self._poll.register(self._deaths, select.POLLIN)

    def run(self) -> None:
        """Serves until the frontend has closed the control socket."""
        while True:
            timeout = NICE_AFTER * 1000 if self._young else None
            events = dict(self._poll.poll(timeout))
            if self._deaths in events:
                os.read(self._deaths, 4096)
                self._reap()
            gone = [pid for pid, line in self._lines.items() if line.fileno() in events]
            for pid in gone:
                self._forget(pid)
                os.kill(pid, signal.SIGKILL)
            if self._control.fileno() in events and not self._take():
                break
            self._yield_to_others()
        for pid in self._lines:
            os.kill(pid, signal.SIGKILL)

    def _take(self) -> bool:
        """Forks a child for the socket that has come. False when the frontend is gone."""
        data, descriptors, _, _ = socket.recv_fds(self._control, 1, 1)
        for descriptor in descriptors:
            line = socket.socket(fileno=descriptor)
            pid = os.fork()
            if not pid:
                self._serve(line)
            self._lines[pid] = line
            self._young[pid] = time.monotonic()
            self._poll.register(line, select.POLLRDHUP)
        return bool(data)

    def _serve(self, line: socket.socket) -> None:
        """Answers one check, in the child, and ends it."""
        signal.set_wakeup_fd(-1)
        self._control.close()
        for other in self._lines.values():
            other.close()
        log = os.fdopen(os.dup(2), "w")
        try:
            grammars = msgspec.msgpack.decode(_receive(line), type=list[str])
            _limit_memory(self._spec.memory)
            for grammar in grammars:
                signal.setitimer(signal.ITIMER_PROF, self._spec.seconds)  # SIGPROF ends the process
                fault = self._trial.fault(grammar)
                _send(line, fault)
                if fault:
                    break
            os._exit(0)
        except MemoryError:
            os.abort()
        except (OSError, EOFError):  # the frontend has gone
            os._exit(0)
        except BaseException:
            traceback.print_exc(file=log)
            log.flush()
        finally:
            os._exit(1)

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    return
                line = self._forget(pid)
                if line is not None:
                    with contextlib.suppress(OSError):
                        _send(line, os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0)
                    line.close()

    def _forget(self, pid: int) -> socket.socket | None:
        self._young.pop(pid, None)
        line = self._lines.pop(pid, None)
        if line is not None:
            self._poll.unregister(line)
        return line

    def _yield_to_others(self) -> None:
        """Lowers the priority of long checks below that of ranks."""
        before = time.monotonic() - NICE_AFTER
        for pid in [pid for pid, since in self._young.items() if since <= before]:
            del self._young[pid]
            with contextlib.suppress(ProcessLookupError):
                os.setpriority(os.PRIO_PROCESS, pid, NICENESS)


def _limit_memory(size: int) -> None:
    """Lets this process allocate ``size`` more bytes; an allocation beyond them ends it."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + size
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a failed allocation would write into the log


def _receive(line: socket.socket) -> bytes:
    (size,) = LENGTH.unpack(_exactly(line, LENGTH.size))
    return _exactly(line, size)


def _exactly(line: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = line.recv(size - len(parts))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)


def _send(line: socket.socket, message: str | int) -> None:
    body = msgspec.msgpack.encode(message)
    line.sendall(LENGTH.pack(len(body)) + body)


def main() -> None:
    """Runs a keeper: the control socket is the descriptor in the first argument, the second is its
    spec.
    """
    spec = msgspec.json.decode(sys.argv[2], type=KeeperSpec)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the group; the frontend decides
    with socket.socket(fileno=int(sys.argv[1])) as control:
        vocabulary = load_vocabulary(Path(spec.model_path), spec.vocab_size, spec.eos_ids)
        assert vocabulary is not None, f"{spec.model_path}: no tokenizer"
        keeper = _Keeper(spec, Trial(vocabulary), control)
        control.sendall(READY)
        keeper.run()


if __name__ == "__main__":
    main()
