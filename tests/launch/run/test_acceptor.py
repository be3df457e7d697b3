"""The port of the cluster, with hand-made frontends."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lockstep.engine.frontend.connections import ENDED, OPEN, TAKEN
from lockstep.engine.frontend.metrics.shared_counters import shared_bytes
from lockstep.launch.cluster.cluster import LaunchError
from lockstep.launch.run.acceptor import Acceptor
from support.launch.clusters import until


class Frontend:
    """The other end of a line: takes every connection unless told not to."""

    def __init__(self, acceptor: Acceptor, index: int, token: str | None = None) -> None:
        self.line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.line.settimeout(60)
        self.line.connect(b"\0" + acceptor.spec.address.encode())
        self.line.send(f"{token or acceptor.spec.token} {index}".encode())
        self.connections: list[socket.socket] = []

    def join(self) -> Frontend:
        _, [board], _, _ = socket.recv_fds(self.line, 64, 1)
        with open(board, "rb") as memory:
            self.board_bytes = memory.seek(0, 2)
        self.line.send(OPEN)
        return self

    def take(self, seconds: float = 0.3, answer: bytes = TAKEN) -> int:
        """Takes connections until none has come for ``seconds``; returns how many it has."""
        self.line.settimeout(seconds)
        try:
            while True:
                _, [descriptor], _, _ = socket.recv_fds(self.line, 64, 1)
                self.connections.append(socket.socket(fileno=descriptor))
                if answer:
                    self.line.send(answer)
        except TimeoutError:
            return len(self.connections)

    def end(self) -> None:
        self.connections.pop().close()
        self.line.send(ENDED)

    def close(self) -> None:
        self.line.close()
        for connection in self.connections:
            connection.close()


@contextmanager
def opened(
    num_frontends: int, **limits: int
) -> Iterator[tuple[Acceptor, list[Frontend], list[socket.socket]]]:
    """An acceptor that listens, its frontends, and a list for the clients that a test opens."""
    acceptor = Acceptor("127.0.0.1", 0, num_frontends)
    frontends = [Frontend(acceptor, index).join() for index in range(num_frontends)]
    clients: list[socket.socket] = []
    acceptor.open()
    try:
        yield acceptor, frontends, clients
    finally:
        acceptor.close()
        for part in (*frontends, *clients):
            part.close()


def connect(acceptor: Acceptor) -> socket.socket:
    return socket.create_connection(("127.0.0.1", acceptor.port), timeout=60)


@pytest.mark.parametrize("num_frontends", [1, 2, 3, 4])
def test_connections_are_spread_evenly(num_frontends: int) -> None:
    with opened(num_frontends) as (acceptor, frontends, clients):
        clients += [connect(acceptor) for _ in range(60)]
        taken = [0] * num_frontends
        deadline = time.monotonic() + 10
        while sum(taken) < 60:
            assert time.monotonic() < deadline, taken
            taken = [frontend.take(0.05) for frontend in frontends]
        assert taken == [60 // num_frontends] * num_frontends
        assert all(frontend.board_bytes == shared_bytes(num_frontends) for frontend in frontends)


def test_the_one_with_the_fewest_open_connections_gets_the_next() -> None:
    with opened(2) as (acceptor, [first, second], clients):
        clients += [connect(acceptor) for _ in range(8)]
        assert (first.take(), second.take()) == (4, 4)
        for _ in range(3):
            second.end()
        until(lambda: acceptor._channels[1].num_open == 1, "the acceptor to know of the ends")
        clients += [connect(acceptor) for _ in range(3)]
        assert (second.take(), first.take()) == (4, 4)


def test_a_connection_that_was_not_taken_goes_to_another_frontend() -> None:
    with opened(2) as (acceptor, [first, second], clients):
        clients += [connect(acceptor) for _ in range(10)]
        for number, client in enumerate(clients):
            client.sendall(b"%d" % number)
        assert first.take(answer=b"") == 5, "read, and not answered"
        for connection in first.connections:
            connection.close()
        first.connections.clear()
        first.line.close()
        assert second.take() == 10
        assert sorted(connection.recv(9) for connection in second.connections) == [
            b"%d" % number for number in range(10)
        ]


def test_one_that_takes_nothing_is_named_and_gets_no_more() -> None:
    with opened(2) as (acceptor, [deaf, well], clients):
        clients += [connect(acceptor) for _ in range(4)]
        assert well.take() == 2
        assert acceptor.stuck(5.0) == [] and acceptor.stuck(0.1) == [0]
        clients += [connect(acceptor) for _ in range(100)]
        assert well.take() == 104 - 32, "it may leave 32 untaken"
        assert deaf.take(0.1) == 32
        until(lambda: acceptor.stuck(0.0) == [], "the acceptor to know that they were taken")


def test_without_a_frontend_connections_wait_for_one() -> None:
    with opened(1) as (acceptor, [first], clients):
        first.line.close()
        time.sleep(0.1)
        clients.append(connect(acceptor))
        clients[0].sendall(b"patience")
        time.sleep(0.1)
        second = Frontend(acceptor, 0).join()
        assert second.take() == 1 and second.connections[0].recv(9) == b"patience"
        second.close()


def test_who_takes_a_place_ends_the_line_of_the_one_before() -> None:
    with opened(1) as (acceptor, [first], clients):
        second = Frontend(acceptor, 0).join()
        assert first.line.recv(9) == b""
        clients.append(connect(acceptor))
        assert second.take() == 1
        second.close()


@pytest.mark.parametrize(("token", "index"), [("wrong", 0), (None, 1), (None, 7)])
def test_strangers_are_turned_away(token: str | None, index: int) -> None:
    with opened(1) as (acceptor, [first], clients):
        stranger = Frontend(acceptor, index, token)
        assert stranger.line.recv(64) == b""
        stranger.close()
        idlers = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(40)]
        for idler in idlers:
            idler.connect(b"\0" + acceptor.spec.address.encode())
        clients.append(connect(acceptor))
        assert first.take() == 1
        for idler in idlers:
            idler.close()


def test_nothing_listens_before_it_is_opened_and_after_it_is_closed() -> None:
    acceptor = Acceptor("127.0.0.1", 0, 1)
    with pytest.raises(ConnectionRefusedError):
        connect(acceptor)
    acceptor.open()
    connect(acceptor).close()
    acceptor.close()
    acceptor.close()
    with pytest.raises(ConnectionRefusedError):
        connect(acceptor)
    acceptor.check()


def test_its_thread_may_end_before_it_is_woken_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that ends at the same moment shows it that it is being closed."""
    acceptor = Acceptor("127.0.0.1", 0, 1)
    line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    acceptor._closing = True
    line.connect(b"\0" + acceptor.spec.address.encode())
    line.close()
    acceptor._thread.join(60)
    monkeypatch.setattr(acceptor._thread, "is_alive", lambda: True)  # as it was when somebody looked
    acceptor.close()
    acceptor.check()


def test_a_taken_port_is_a_clear_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            LaunchError, match=f"frontend.port = {port}: cannot be listened on: Address already in use"
        ):
            Acceptor("127.0.0.1", port, 1)
    late, early = Acceptor("127.0.0.1", port, 1), Acceptor("127.0.0.1", port, 1)
    early.open()
    with pytest.raises(
        LaunchError, match=f"frontend.port = {port}: cannot be listened on: Address already in use"
    ):
        late.open()
    late.close()
    early.close()
