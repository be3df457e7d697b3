"""The entry point of every process of a cluster: ``python -m lockstep.launch.cluster.entry ROLE
INDEX PARENT_PID``.

The role's specification is read from standard input as JSON. A failure is reported to the lobby in
one line and written to the log, which is standard error, in full.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import importlib
import logging
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

import msgspec

from ...engine.protocol.lobby import Lobby
from ...engine.protocol.specs import ControllerSpec, FrontendSpec, LobbySpec, RankSpec
from ...parallel.recovery import SPENT_STATUS, ProcessSpent
from ..environment import keep_triton_kernels
from ..log_lines import log_to_stderr

_log = logging.getLogger("lockstep.process")
_PR_SET_PDEATHSIG = 1
ROLES: dict[str, tuple[str, type[ControllerSpec] | type[RankSpec] | type[FrontendSpec]]] = {
    "controller": ("engine.controller.process", ControllerSpec),
    "rank": ("engine.rank.process", RankSpec),
    "frontend": ("engine.frontend.process", FrontendSpec),
}


def leave_with_parent(parent: int) -> None:
    """Makes Linux kill this process when ``parent`` ends; exits at once if it already has."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        os._exit(1)


def one_line(error: BaseException) -> str:
    """The error as one line for users: its text, with its type unless it is a ValueError or
    OSError.
    """
    text = " ".join(str(error).split())
    if text and isinstance(error, ValueError | OSError):
        return text
    return f"{type(error).__name__}: {text}".rstrip(": ")


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(0)


def main() -> NoReturn:
    """Runs the role that the command line names."""
    run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.stdin.buffer.read)


def run(role: str, index: int, parent: int, read_spec: Callable[[], bytes]) -> NoReturn:
    """Runs one role in this process, a child of ``parent``. Never returns: exits with 0 when the
    role ended as asked, 1 when it failed, SPENT_STATUS when it cannot go on and others can.
    """
    leave_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the launcher's to handle
    signal.signal(signal.SIGTERM, _terminated)
    faulthandler.enable()
    log_to_stderr(f"{role}-{index}")
    _log.info("starts with process id %d on %s", os.getpid(), os.uname().nodename)
    code, lobby = 0, None
    try:
        module, spec_type = ROLES[role]
        spec = msgspec.json.decode(read_spec(), type=spec_type)
        lobby = spec.lobby
        if isinstance(spec, RankSpec) and spec.device != "cpu":
            keep_triton_kernels()
        gc.disable()  # all that imports make stays: a tenth of their time would go into looks at it
        main = importlib.import_module(f"{__package__.partition('.')[0]}.{module}").main
        gc.freeze()
        gc.enable()
        main(spec)
    except SystemExit as leave:
        code = status_of(leave)
    except ProcessSpent as spent:
        _log.warning("%s", spent)
        code = SPENT_STATUS
    except BaseException as error:
        _log.critical("%s %d has failed", role, index, exc_info=error)
        _report_failure(lobby, role, index, one_line(error))
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # teardown can hang in threads of a communicator whose peers are gone


def status_of(leave: SystemExit) -> int:
    """The exit status that Python gives a process that ends with ``leave``."""
    return leave.code if isinstance(leave.code, int) else int(leave.code is not None)


def _report_failure(lobby: LobbySpec | None, role: str, index: int, detail: str) -> None:
    with Lobby(lobby, role, index) as line:
        line.report("failed", detail)


if __name__ == "__main__":
    main()
