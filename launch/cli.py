"""The console script: set-up before anything large is imported."""

from __future__ import annotations

import gc
import os
import signal
import sys

_COLLECT_AFTER = 20_000  # new objects; imports make some 50,000 that stay


def main() -> None:
    """Runs the command line. During its import Ctrl-C ends the process without a traceback."""
    gc.set_threshold(_COLLECT_AFTER)  # 700 would make up a tenth of a short command's time
    # A background job ignores SIGINT, and goes on ignoring it.
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if interruptible:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    _replace_closed_streams()
    from .commands.main import run

    if interruptible:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


def _replace_closed_streams() -> None:
    """Opens /dev/null for a standard stream that the caller has closed.

    Otherwise the next file or socket would get its number, and the output.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number is this one
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8"))


if __name__ == "__main__":
    main()
