"""Progress of a client on the terminal."""

from __future__ import annotations

import time

from rich.console import Console
from rich.markup import escape

_EVERY = 10.0  # seconds between lines where there is no terminal


class StatusLine:
    """A line that changes in place; without a terminal a line every ten seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status = console.status("") if console.is_terminal else None
        self._next = time.monotonic() + _EVERY

    def show(self, text: str) -> None:
        if self._status is not None:
            self._status.start()
            self._status.update(escape(text))
        elif time.monotonic() >= self._next:
            self._next = time.monotonic() + _EVERY
            self._console.print(text, markup=False)

    def hide(self) -> None:
        if self._status is not None:
            self._status.stop()
