"""A relay in front of a server that goes away after so many connections."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def relay(port: int, connections: int) -> Iterator[str]:
    """URL of a server that passes so many connections on to ``port`` and refuses all later ones."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=_pass_on, args=(listener, port, connections), daemon=True)
        thread.start()
        yield url
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        thread.join(30.0)
        assert not thread.is_alive(), "the relay still passes a connection on after 30 s"


def _pass_on(listener: socket.socket, port: int, connections: int) -> None:
    for _ in range(connections):
        try:
            client, _ = listener.accept()
        except OSError:  # the test is over
            return
        with client, socket.create_connection(("127.0.0.1", port)) as server:
            back = threading.Thread(target=_copy, args=(server, client), daemon=True)
            back.start()
            _copy(client, server)
            back.join(30.0)
    listener.close()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
