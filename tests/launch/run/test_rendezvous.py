"""The store where ranks meet: torch's interface, waiting, and strangers."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import pytest
import torch
import zmq
from torch.distributed import PrefixStore, TCPStore

from lockstep.engine.protocol.meeting import PutValue
from lockstep.engine.protocol.message import encode
from lockstep.engine.protocol.sockets import client_socket, new_keypair
from lockstep.engine.protocol.specs import Keys
from lockstep.engine.rank.meeting_store import MeetingError, MeetingStore
from lockstep.launch.run.keyring import Keyring
from lockstep.launch.run.rendezvous import Rendezvous
from lockstep.parallel.collectives import CollectiveError, Collectives
from lockstep.parallel.recovery import ProcessSpent
from lockstep.parallel.store_ranks import StoreRanks
from support.engine.rank.mock_controller import bare_spec

SECONDS = 60.0


class Meeting:
    """A store and the connections to it."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.keyring = Keyring(["launcher", "rank 0", "rank 1", "rank 2"])
        self.point = Rendezvous("127.0.0.1", *self.keyring.store, allowed=self.keyring.ranks)
        stack.callback(self.point.close)

    @property
    def door(self) -> tuple[str, int]:
        host, _, port = self.point.address.removeprefix("tcp://").partition(":")
        return host, int(port)

    def store(
        self, rank: int, deadline: float = SECONDS, kind: Callable[..., MeetingStore] = MeetingStore
    ) -> MeetingStore:
        keys = self.keyring.to_store(f"rank {rank}")
        made = kind(bare_spec(rank=rank, store_address=self.point.address, store_keys=keys), deadline)
        self._stack.callback(made.close)
        return made

    def connection(self, keys: Keys) -> zmq.Socket[bytes]:
        context: zmq.Context[zmq.Socket[bytes]] = self._stack.enter_context(zmq.Context())
        made = client_socket(context, zmq.DEALER, keys, b"somebody")
        self._stack.callback(made.close)
        made.connect(self.point.address)
        return made


@pytest.fixture
def meeting() -> Iterator[Meeting]:
    with ExitStack() as stack:
        yield Meeting(stack)


def test_it_is_a_store_of_torch(meeting: Meeting) -> None:
    one, two = (PrefixStore("epoch", meeting.store(rank)) for rank in (0, 1))
    one.set("key", "value")
    assert two.get("key") == b"value"
    assert two.check(["key"]) and not two.check(["key", "other"])
    assert [one.add("sum", 2), two.add("sum", 3)] == [2, 5]
    assert one.compare_set("first", "", "mine") == two.compare_set("first", "", "late") == b"mine"
    assert one.compare_set("first", "mine", "next") == b"next"
    assert one.compare_set("absent", "old", "new") == b"old" and not one.check(["absent"])
    assert one.delete_key("key") and not two.delete_key("key") and not two.check(["key"])
    assert not meeting.store(2).check(["sum"]), "prefixes keep epochs apart"


def test_a_wait_ends_when_the_last_key_is_there(meeting: Meeting) -> None:
    one, two = meeting.store(0), meeting.store(1)
    with ThreadPoolExecutor() as pool:
        got = pool.submit(one.get, "a")
        waited = pool.submit(one.wait, ["a", "b"])
        two.set("a", b"1")
        assert got.result(SECONDS) == b"1"
        two.set("b", b"2")
        waited.result(SECONDS)


def test_a_wait_in_vain_names_its_keys(meeting: Meeting) -> None:
    store = meeting.store(0)
    store.set("a", b"")
    with pytest.raises(MeetingError, match=rf"no value of b at {meeting.point.address} within 0\.1 s"):
        store.wait(["a", "b"], timedelta(seconds=0.1))


def test_nobody_there(meeting: Meeting) -> None:
    meeting.point.close()
    with pytest.raises(MeetingError, match=rf"no answer from the store at {meeting.point.address} within"):
        meeting.store(0, deadline=0.2).get("a")


def test_ranks_that_share_memory_ask_one_another(meeting: Meeting) -> None:
    """As FlashInfer does. If one is silent, the memory stays half made: the process is spent."""

    def talk(index: int) -> Any:
        ranks = StoreRanks(PrefixStore("epoch", meeting.store(index)), index, 3).Split(0, index)
        ranks.barrier()
        told = ranks.allgather((f"host{index}", None, bytes([index, 255])))
        return [list(part) for part in told], ranks.bcast(index * 10, 2)

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(talk, range(3)))
    assert found == [([[f"host{index}", None, bytes([index, 255])] for index in range(3)], 20)] * 3
    silent = StoreRanks(PrefixStore("next", meeting.store(1, deadline=0.1)), 1, 3)
    with pytest.raises(ProcessSpent, match="rank 1 shares memory with 2 others: no "):
        silent.barrier()


def test_without_a_rank_s_key_nothing_is_read_or_written(meeting: Meeting) -> None:
    keyring, (public, secret) = meeting.keyring, new_keypair()
    theirs = [
        Keys(server_public=keyring.store[0], public=public, secret=secret),  # made by themselves
        keyring.to_store("launcher"),  # of this run, but no rank's
        keyring.to_lobby("rank 0"),  # a rank's, meant for another socket
    ]
    strangers = [meeting.connection(keys) for keys in theirs]
    for stranger in strangers:
        stranger.send(encode(PutValue(1, "key", b"theirs")))
    with pytest.raises((RuntimeError, ValueError)):
        TCPStore(*meeting.door, is_master=False, timeout=timedelta(seconds=0.5))
    store = meeting.store(0)
    store.set("key", b"ours")
    assert not any(stranger.poll(200) for stranger in strangers)
    assert meeting.store(1).get("key") == b"ours"


def test_garbage_and_silence_disturb_nobody(meeting: Meeting) -> None:
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01CURVE" + bytes(47)
    openings = [b"", b"\xff", bytes(1000), b"GET / HTTP/1.1\r\n\r\n", greeting, greeting + b"\x06\xff" * 99]
    store = meeting.store(0)
    with ExitStack() as held:
        for opening in openings * 8:
            line = held.enter_context(socket.create_connection(meeting.door, timeout=SECONDS))
            line.sendall(opening)
        ours = meeting.connection(meeting.keyring.to_store("rank 2"))
        for malformed in (b"", b"\xc1", encode(PutValue(1, "x", b""))[:-1], b"\x93\xa3add\x01\xa1x"):
            ours.send(malformed)
        store.set("key", b"value")
        assert meeting.store(1).get("key") == b"value"


def test_a_message_too_long_for_any_of_ours_is_not_taken(meeting: Meeting) -> None:
    """Before it has shown a key, a stranger could fill the memory with one frame."""
    with socket.create_connection(meeting.door, timeout=SECONDS) as line:
        line.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x01CURVE" + bytes(47))
        line.sendall(b"\x06" + struct.pack(">Q", 256 << 20))
        with pytest.raises(ConnectionError):
            for _ in range(128):
                line.sendall(bytes(1 << 20))
    assert not meeting.store(0).check(["key"])


# --------------------------------------------------------------------- groups


def build_all(groups: list[Collectives], epoch: int) -> list[str]:
    """Builds all groups at once; returns what each raised."""

    def build(group: Collectives) -> str:
        try:
            group.build(epoch)
        except CollectiveError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(groups)) as pool:
        return list(pool.map(build, groups))


def grouped(stores: list[Any], deadline: float) -> list[Collectives]:
    cpu = torch.device("cpu")
    return [
        Collectives("ranks", rank, len(stores), store, deadline, cpu) for rank, store in enumerate(stores)
    ]


def test_ranks_meet_in_every_epoch(meeting: Meeting) -> None:
    groups = grouped([meeting.store(rank) for rank in range(3)], SECONDS)
    for epoch in range(2):
        assert build_all(groups, epoch) == [""] * 3
        with ThreadPoolExecutor(3) as pool:
            gathered = pool.map(
                lambda group: group.wait(group.all_gather(torch.tensor([group.index]), "x")).tolist(), groups
            )
            assert list(gathered) == [[0, 1, 2]] * 3
    for group in groups:
        group.destroy()


class Watched(MeetingStore):
    """Shows what a rank publishes to ``seen`` before its peers can know it."""

    seen: Callable[[bytes], None]

    def set(self, key: str, value: bytes | str) -> None:
        self.seen(value if isinstance(value, bytes) else value.encode())
        super().set(key, value)


def listening() -> set[int]:
    """Ports of the loopback on which this process listens."""
    import psutil

    return {entry.laddr.port for entry in psutil.Process().net_connections("tcp") if entry.status == "LISTEN"}


@pytest.mark.parametrize("words", [b"", b"\xff" * 4096], ids=["silent", "garbage"])
def test_a_stranger_in_place_of_a_rank_is_an_error_and_the_next_epoch_is_whole(
    meeting: Meeting, words: bytes
) -> None:
    """The stranger connects before the peer, under the number that gloo expects of the peer."""
    before, lock, lines = listening(), threading.Lock(), []

    def intrude(value: bytes) -> None:
        with lock:
            for port in listening() - before:
                for number in range(4):
                    line = socket.create_connection(("127.0.0.1", port), timeout=SECONDS)
                    line.sendall(struct.pack("<q", number) + words)
                    lines.append(line)
        time.sleep(0.2)

    stores = [meeting.store(rank, kind=Watched) for rank in range(2)]
    for store in stores:
        store.seen = intrude  # type: ignore[attr-defined]
    groups = grouped(stores, 2.0)
    errors = build_all(groups, 0)
    assert any("did not meet its 1 peers" in error for error in errors), errors
    for store in stores:
        store.seen = lambda value: None  # type: ignore[attr-defined]
    for line in lines:
        line.close()
    assert build_all(groups, 1) == ["", ""]
    for group in groups:
        group.destroy()
