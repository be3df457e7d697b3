"""Tests whether nodes reach each other: each listens, and each calls every other.

A caller sends a shared token, measures round trips of one byte, then briefly sends at full rate.
"""

from __future__ import annotations

import hmac
import socket
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import msgspec

CONNECT_SECONDS = 3.0
SEND_SECONDS = 0.2
_PINGS = 16
_BLOCK = bytes(1 << 18)
_COUNT = 8


class Peer(msgspec.Struct, frozen=True):
    """A node that listens."""

    name: str
    address: str
    port: int


class Link(msgspec.Struct, frozen=True):
    """One direction between two nodes, by name. ``problem``: empty if it works. ``round_trip``:
    median seconds. ``rate``: bytes/s of one TCP stream, 0 if not measured.
    """

    source: str
    target: str
    problem: str = ""
    round_trip: float = 0.0
    rate: float = 0.0


class Listener:
    """Answers callers at ``address`` and ``port``, each in its own thread, until closed."""

    def __init__(self, address: str, token: bytes) -> None:
        self._token = token
        self._socket = socket.create_server((address, 0), backlog=256, family=_family(address))
        self.port = int(self._socket.getsockname()[1])
        threading.Thread(target=self._accept, name="reach", daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                line, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(line,), name="reach caller", daemon=True).start()

    def _answer(self, line: socket.socket) -> None:
        with line:
            line.settimeout(CONNECT_SECONDS)
            try:
                if not hmac.compare_digest(_receive(line, len(self._token)), self._token):
                    return
                for _ in range(_PINGS):
                    line.sendall(_receive(line, 1))
                buffer, count = bytearray(len(_BLOCK)), 0
                while size := line.recv_into(buffer):
                    count += size
                line.sendall(count.to_bytes(_COUNT, "little"))
            except OSError:
                return  # the caller reports the problem


def call(source: str, peers: list[Peer], token: bytes, *, measure: bool) -> list[Link]:
    """Calls all ``peers`` at once. ``measure``: also sends at full rate; use with one peer."""
    if not peers:
        return []
    with ThreadPoolExecutor(len(peers)) as pool:
        return list(pool.map(lambda peer: _call(source, peer, token, measure), peers))


def _call(source: str, peer: Peer, token: bytes, measure: bool) -> Link:
    where = f"{peer.address}:{peer.port}"
    try:
        with socket.create_connection((peer.address, peer.port), timeout=CONNECT_SECONDS) as line:
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            line.sendall(token)
            trips = []
            for _ in range(_PINGS):
                start = time.perf_counter()
                line.sendall(b"?")
                _receive(line, 1)
                trips.append(time.perf_counter() - start)
            return Link(source, peer.name, "", statistics.median(trips), _rate(line) if measure else 0.0)
    except TimeoutError:
        return Link(source, peer.name, f"{where}: no answer within {CONNECT_SECONDS:g} s")
    except OSError as error:
        return Link(source, peer.name, f"{where}: {error.strerror or error}")


def _rate(line: socket.socket) -> float:
    start = time.perf_counter()
    while time.perf_counter() - start < SEND_SECONDS:
        line.sendall(_BLOCK)
    line.shutdown(socket.SHUT_WR)
    received = int.from_bytes(_receive(line, _COUNT), "little")
    return received / (time.perf_counter() - start)


def _receive(line: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = line.recv(size - len(data))
        if not part:
            raise ConnectionResetError("closed by the other end")
        data += part
    return data


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
