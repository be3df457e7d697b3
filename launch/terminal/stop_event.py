"""Ctrl-C and SIGTERM as an event, for commands that run in an event loop."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager

_SIGNALS = signal.SIGINT, signal.SIGTERM


@contextmanager
def stop_event() -> Iterator[asyncio.Event]:
    """An event that the first of these signals sets; call it inside a running loop."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, stop.set)
    try:
        yield stop
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
