"""The store where ranks find each other (torch.distributed). In the launcher it outlives them."""

from __future__ import annotations

import socket
import threading
from typing import Any

from ..environment import prepare_store


class Rendezvous:
    """A TCPStore that listens on ``host`` only, opened in a thread: torch takes seconds to import.

    ``port`` is known at once; early clients wait in the backlog of the listening socket.
    """

    def __init__(self, host: str) -> None:
        self.host = host
        self._socket = socket.create_server((host, 0), backlog=1024)
        self.port = int(self._socket.getsockname()[1])
        self._store: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._open, name="rendezvous", daemon=True)
        self._thread.start()

    def _open(self) -> None:
        try:
            prepare_store()
            import torch.distributed

            listening = self._socket.detach()
            if listening >= 0:  # not closed meanwhile
                self._store = torch.distributed.TCPStore(  # type: ignore[attr-defined]
                    self.host, self.port, is_master=True, wait_for_workers=False, master_listen_fd=listening
                )
        except BaseException as error:
            self._error = error

    def check(self) -> None:
        """Raises the error of the thread, if any."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Closes without waiting for the thread, which then finds the socket closed."""
        self._socket.close()
        self._store = None
