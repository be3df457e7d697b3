"""Events of the block index for routers outside: their form, their numbers, replays, failures."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import zmq

from lockstep.engine.controller import kv_events
from lockstep.engine.controller.kv_events import KVEventPublisher, KVEventSockets
from lockstep.engine.kv.hashing import chain_hashes
from lockstep.engine.planner.index_changes import BlocksRemoved, BlocksStored
from lockstep.engine.protocol.arrays import as_keys
from lockstep.engine.protocol.specs import KVEventsSpec
from support.engine.kv_router import END, KVRouter, free_address, name_of
from support.engine.planner.planner_world import ROOT

PAGE = 4


def spec(topic: str = "") -> KVEventsSpec:
    return KVEventsSpec(address=free_address(), replay_address=free_address(), topic=topic)


@contextmanager
def publishing(spec: KVEventsSpec, first: int = 0) -> Iterator[KVEventPublisher]:
    publisher = KVEventPublisher(KVEventSockets(spec, 5.0), PAGE, first)
    try:
        yield publisher
    finally:
        publisher.close()
        assert not publisher._thread.is_alive()


def prompt(start: int, blocks: int) -> tuple[bytes, bytes]:
    """Tokens and hashes of a prompt of full blocks."""
    tokens = np.arange(start, start + PAGE * blocks, dtype=np.int32).tobytes()
    return tokens, chain_hashes(ROOT, tokens, PAGE)[16:]


def stored(start: int, blocks: int, first: int = 0) -> BlocksStored:
    """The blocks of a prompt from ``first`` on."""
    tokens, hashes = prompt(start, blocks)
    return BlocksStored(
        hashes[16 * max(0, first - 1) : 16 * first], hashes[16 * first :], tokens[4 * PAGE * first :]
    )


def removed(start: int, blocks: int, first: int = 0) -> BlocksRemoved:
    return BlocksRemoved(as_keys(prompt(start, blocks)[1][16 * first :]))


def names(start: int, blocks: int) -> list[int]:
    hashes = prompt(start, blocks)[1]
    return [name_of(hashes[at : at + 16]) for at in range(0, len(hashes), 16)]


def meet(router: KVRouter) -> None:
    """Until the subscription has arrived, which brings a batch at once."""
    assert router.follow(10), "no batch within 10 s"
    router.drain(0.2)


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def test_a_router_learns_tokens_parents_and_removals() -> None:
    where = spec("kv@pod@model")
    with publishing(where) as publisher, KVRouter(where.address, where.replay_address, where.topic) as router:
        meet(router)
        publisher.publish([stored(0, 3), stored(0, 5, first=3)])
        publisher.publish([removed(0, 5, first=4)])
        router.drain()
        known = names(0, 5)
        assert list(router.mirror) == known[:4]
        assert [parent for parent, _ in router.mirror.values()] == [None, *known[:3]]
        assert [token for _, tokens in router.mirror.values() for token in tokens] == list(range(16))


def test_a_block_leaves_with_the_last_data_index_that_holds_it() -> None:
    where = spec()
    with publishing(where) as publisher, KVRouter(where.address, where.replay_address) as router:
        meet(router)
        publisher.publish([stored(0, 3), stored(0, 4)])
        publisher.publish([removed(0, 3, first=1)])
        router.drain()
        assert list(router.mirror) == names(0, 4)
        publisher.publish([removed(0, 4)])
        router.drain()
        assert list(router.mirror) == names(0, 1)
        assert router.ignored_removals == 0


def test_long_prompts_come_in_batches_that_join() -> None:
    where = spec()
    with publishing(where) as publisher, KVRouter(where.address, where.replay_address) as router:
        meet(router)
        before = router.last
        publisher.publish([stored(0, 40), stored(5000, 333)])
        router.drain()
        assert list(router.mirror) == [*names(0, 40), *names(5000, 333)]
        parents = [parent for parent, _ in router.mirror.values()]
        assert parents == [None, *names(0, 40)[:-1], None, *names(5000, 333)[:-1]]
        assert router.last - before >= 6


def test_a_gap_is_closed_by_a_replay() -> None:
    where = spec("t")
    with publishing(where) as publisher, KVRouter(where.address, where.replay_address, "t") as router:
        meet(router)
        publisher.publish([stored(0, 3)])
        router.drain()
        gaps = router.gaps  # 1 if the subscription came after the first batch
        for start in (100, 200, 300):
            publisher.publish([stored(start, 2)])
        publisher.publish([removed(0, 3)])
        lost = [router.lose(2.0) for _ in range(4)]
        assert lost == list(range(router.last + 1, router.last + 5))
        publisher.publish([stored(400, 1)])
        router.drain()
        assert router.gaps == gaps + 1
        assert list(router.mirror) == [*names(100, 2), *names(200, 2), *names(300, 2), *names(400, 1)]


def test_a_late_router_gets_everything_from_the_start() -> None:
    where = spec()
    with publishing(where) as publisher:
        for start in range(0, 1000, 100):
            publisher.publish([stored(start, 2)])
        publisher.publish([removed(0, 2)])
        with KVRouter(where.address, where.replay_address) as router:
            assert router.catch_up()[:12] == list(range(12))
            assert router.cleared == 1 and len(router.mirror) == 18


def test_a_replay_that_reaches_not_far_enough_clears_the_mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_events, "_REPLAY_BATCHES", 5)
    where = spec()
    with publishing(where) as publisher, KVRouter(where.address, where.replay_address) as router:
        publisher.publish([stored(0, 2)])
        meet(router)
        assert len(router.mirror) == 2
        base = publisher._next
        for start in range(100, 1000, 100):
            publisher.publish([stored(start, 1)])
        publisher.publish([removed(0, 2)])
        until(lambda: publisher._next == base + 10, "all batches")
        assert router.catch_up() == list(range(base + 4, base + 10)), "the first of them clears"
        assert list(router.mirror) == [name for start in (600, 700, 800, 900) for name in names(start, 1)]
        assert router.ignored_removals == 2


def test_replay_bytes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_events, "_REPLAY_BYTES", 1000)
    where = spec()
    with publishing(where) as publisher:
        for start in range(0, 3000, 100):
            publisher.publish([stored(start, 1)])
        until(lambda: publisher._next == 31, "all batches")
        assert publisher._sent_bytes <= 1000 and 3 < len(publisher._sent) < 15


def test_a_later_controller_clears_the_mirror_even_of_who_misses_its_first_batch() -> None:
    where = spec()
    with KVRouter(where.address, where.replay_address) as router:
        with publishing(where) as publisher:
            meet(router)
            publisher.publish([stored(0, 3)])
            router.drain()
            assert len(router.mirror) == 3
        with publishing(where, first=1 << 32) as publisher:
            publisher.publish([stored(100, 2)])
            meet(router)
            assert router.last > 1 << 32
            assert list(router.mirror) == names(100, 2)


def test_subscriptions_fill_no_place_among_the_replays() -> None:
    where = spec()
    with publishing(where) as publisher:
        publisher.publish([stored(0, 2)])
        for _ in range(5):
            with KVRouter(where.address, where.replay_address) as router:
                meet(router)
                assert list(router.mirror) == names(0, 2)
        assert [number for number, _ in publisher._sent] == [0, 1, 2]


def test_rows_of_a_prompt_that_is_known_in_part_are_told_once() -> None:
    where = spec()
    with publishing(where) as publisher, KVRouter(where.address, where.replay_address) as router:
        meet(router)
        publisher.publish([stored(0, 6)])
        publisher.publish([BlocksRemoved(removed(0, 6).keys[2:4])])
        publisher.publish([stored(0, 6)])
        router.drain()
        assert sorted(router.mirror, key=names(0, 6).index) == names(0, 6)


def test_a_subscriber_that_reads_nothing_delays_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_events, "_SUBSCRIBER_BATCHES", 4)
    where = spec()
    with (
        publishing(where) as publisher,
        KVRouter(where.address, where.replay_address) as sleepy,
        KVRouter(where.address, where.replay_address) as router,
    ):
        meet(sleepy)
        router.catch_up()
        tokens, hashes = prompt(0, 20_000)
        everything = BlocksStored(b"", hashes, tokens)
        began = time.thread_time()
        publisher.publish([everything])
        assert time.thread_time() - began < 0.05, "handing over is no work"
        until(lambda: publisher._next > 20_000 // 64, "all batches are out, whoever reads")
        router.drain()
        assert len(router.mirror) == 20_000
        sleepy.drain()
        assert sleepy.mirror.keys() == router.mirror.keys(), "it has asked for what it missed"


def test_more_than_can_wait_clears_mirrors(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kv_events, "_MAX_WAITING", 3)
    where = spec()
    go = threading.Event()
    with publishing(where) as publisher, KVRouter(where.address, where.replay_address) as router:
        meet(router)
        base, send = publisher._next, publisher._send
        monkeypatch.setattr(publisher, "_send", lambda events: (go.wait(10), send(events)))
        publisher.publish([stored(0, 1)])
        until(lambda: not publisher._waiting, "the thread to be busy")
        for start in range(100, 900, 100):
            publisher.publish([stored(start, 1)])
        go.set()
        until(lambda: publisher._next == base + 5, "what waited")
        publisher.publish([stored(1000, 1), removed(500, 1)])
        until(lambda: publisher._next == base + 6, "the last batch")
        router.drain()
        assert list(router.mirror) == names(1000, 1)
        assert router.cleared == 2
    assert caplog.text.count("mirrors are cleared") == 1


@pytest.mark.parametrize("frames", [[b""], [b"", b"1234"], [b"x", bytes(8)], [b"", bytes(8), b""], [b""] * 9])
def test_a_replay_that_is_not_understood_is_no_harm(frames: list[bytes]) -> None:
    where = spec()
    with publishing(where) as publisher, KVRouter(where.address, where.replay_address) as router:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        stranger = context.socket(zmq.DEALER)
        stranger.connect(where.replay_address)
        stranger.send_multipart(frames)
        publisher.publish([stored(0, 1)])
        until(lambda: 1 in router.catch_up() or len(router.mirror) == 1, "the block")
        assert not stranger.poll(100)
        context.destroy(linger=0)


def test_a_request_socket_gets_one_answer() -> None:
    """REQ, as the documented subscriber has it, can receive one message only."""
    where = spec("t")
    with publishing(where):
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        asking = context.socket(zmq.REQ)
        asking.connect(where.replay_address)
        asking.send((5).to_bytes(8, "big"))
        assert asking.poll(10_000)
        assert asking.recv_multipart() == [b"", END, b""]
        context.destroy(linger=0)


def test_a_taken_address_is_an_error_that_names_the_key() -> None:
    where = spec()
    with publishing(where):
        for key, other in (
            ("kv_cache.events ", KVEventsSpec(address=where.address)),
            (
                "kv_cache.events_replay ",
                KVEventsSpec(address=free_address(), replay_address=where.replay_address),
            ),
        ):
            with pytest.raises(OSError, match=rf"^{key}tcp:.* cannot be listened on: "):
                KVEventSockets(other, 0.0)


def test_a_later_controller_waits_for_the_address() -> None:
    where = spec()
    sockets = KVEventSockets(where, 0.0)
    threading.Timer(0.3, partial(sockets.close)).start()
    KVEventSockets(where, 10.0).close()
