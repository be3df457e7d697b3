"""Publishes changes of the block index to routers outside, from a thread of its own.

The step thread hands lists of changes over and never waits. The cluster is one source: a block is
there as long as any data index holds it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator

import msgspec
import numpy as np
import zmq

from ..planner.index_changes import BlocksStored, Change
from ..protocol.arrays import UInt64, as_keys
from ..protocol.kv_events import (
    END,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVEvent,
    KVEventBatch,
)
from ..protocol.sockets import bind_when_free
from ..protocol.specs import KVEventsSpec

log = logging.getLogger(__name__)

_MEDIUM = "GPU"  # vLLM's word for the pages that ranks compute from
_BATCH_BLOCKS = 64
"""Blocks of a batch at most: 64 of 64 tokens take 0.1 ms to encode, in which the step thread may
have to wait for the interpreter."""
_BREATH = 0.0002  # seconds between two batches, in which it gets the interpreter
_MAX_WAITING = 10_000  # lists of changes
_REPLAY_BATCHES = 10_000
_REPLAY_BYTES = 64 << 20
_SUBSCRIBER_BATCHES = 4096
_CLOSE_SECONDS = 2.0


class KVEventSockets:
    """A publishing socket and, if asked for, a ROUTER for replays, at the addresses of ``spec``.
    Raises OSError, after ``patience`` seconds in which a predecessor may leave.
    """

    def __init__(self, spec: KVEventsSpec, patience: float) -> None:
        self.topic = spec.topic.encode()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.publish = self._context.socket(zmq.XPUB)  # a PUB that hears of subscriptions
        self.publish.setsockopt(zmq.XPUB_VERBOSE, 1)
        self.publish.setsockopt(zmq.SNDHWM, _SUBSCRIBER_BATCHES)
        self.replay = self._context.socket(zmq.ROUTER)
        self.replay.setsockopt(zmq.SNDHWM, _REPLAY_BATCHES + 2)
        self.replay.setsockopt(zmq.RCVHWM, 64)
        self.replay.setsockopt(zmq.MAXMSGSIZE, 1024)
        self.replay.setsockopt(zmq.ROUTER_MANDATORY, 1)
        try:
            for socket, address, key in (
                (self.publish, spec.address, "kv_cache.events"),
                (self.replay, spec.replay_address, "kv_cache.events_replay"),
            ):
                socket.linger = 0
                socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
                socket.setsockopt(zmq.IPV6, int("[" in address))
                if address:
                    bind_when_free(socket, address, patience, key)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Ends both; the last batches have a second to leave."""
        self.publish.close(linger=1000)
        self.replay.close(linger=0)
        self._context.term()


class KVEventPublisher:
    """Sends batches numbered from ``first`` on. The first one clears the mirrors of earlier
    publishers at this address.

    A subscriber that falls behind or comes late misses batches, sees it by their numbers, and asks
    for a replay. Each new subscription brings all of them a batch, if need be an empty one.
    """

    def __init__(self, sockets: KVEventSockets, page_size: int, first: int) -> None:
        self._sockets, self._page_size = sockets, page_size
        self._waiting: deque[list[Change] | None] = deque([None])
        self._next = first
        self._holders: dict[int, int] = {}  # data indices that hold a block
        self._sent: deque[tuple[int, bytes]] = deque()
        self._sent_bytes = 0
        self._last_is_empty = False
        self._encoder = msgspec.msgpack.Encoder()
        self._closing = self._losing = False
        self._wake = os.eventfd(1, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="kv-events", daemon=True)
        self._thread.start()

    def publish(self, changes: list[Change]) -> None:
        """Hands changes over; for the step thread. Where too many wait, further ones are lost, and
        mirrors are cleared instead.
        """
        if len(self._waiting) < _MAX_WAITING:
            self._losing = False
            self._waiting.append(changes)
        elif not self._losing:
            self._losing = True
            self._waiting.append(None)
            log.error(
                "kv_cache.events: more than %d steps wait to be told; mirrors are cleared", _MAX_WAITING
            )
        os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """Publishes what has been handed over, and ends."""
        self._closing = True
        os.eventfd_write(self._wake, 1)
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():
            log.error("kv_cache.events: not all was published within %g s", _CLOSE_SECONDS)
        else:
            os.close(self._wake)

    def _run(self) -> None:
        try:
            poller = zmq.Poller()
            poller.register(self._sockets.publish, zmq.POLLIN)
            poller.register(self._sockets.replay, zmq.POLLIN)
            poller.register(self._wake, zmq.POLLIN)
            while not self._closing or self._waiting:
                ready = dict(poller.poll())
                if self._wake in ready:
                    os.eventfd_read(self._wake)
                while self._waiting:
                    for events in self._batches(self._waiting.popleft()):
                        self._send(events)
                if self._sockets.publish in ready:
                    self._greet()
                if self._sockets.replay in ready:
                    self._replay()
            self._sockets.close()
        except Exception:
            log.exception("kv_cache.events: no more events are published")

    # ----------------------------------------------------------------- live batches

    def _batches(self, changes: list[Change] | None) -> Iterator[list[KVEvent]]:
        """Events of some changes, in batches of at most ``_BATCH_BLOCKS`` blocks. None clears
        mirrors.
        """
        if changes is None:
            self._holders.clear()
            yield [AllBlocksCleared()]
            return
        events: list[KVEvent] = []
        room = _BATCH_BLOCKS
        for change in changes:
            for event in (
                self._stored(change) if isinstance(change, BlocksStored) else self._gone(change.keys)
            ):
                if len(event.block_hashes) > room:
                    yield events
                    events, room = [], _BATCH_BLOCKS
                events.append(event)
                room -= len(event.block_hashes)
        if events:
            yield events

    def _stored(self, change: BlocksStored) -> Iterator[BlockStored]:
        """Events for the blocks that no data index has held before."""
        names = _names(as_keys(change.hashes_h128))
        parents = [_names(as_keys(change.parent))[0] if change.parent else None, *names[:-1]]
        fresh = [index for index, name in enumerate(names) if self._take(name)]
        for begin, end in _runs(fresh):
            tokens = np.frombuffer(change.tokens_i32, np.int32)[
                begin * self._page_size : end * self._page_size
            ]
            yield BlockStored(
                block_hashes=names[begin:end],
                parent_block_hash=parents[begin],
                token_ids=tokens.tolist(),
                block_size=self._page_size,
                lora_id=None,
                medium=_MEDIUM,
                lora_name=None,
            )

    def _gone(self, keys: UInt64) -> Iterator[BlockRemoved]:
        """Events for the blocks that no data index holds any more."""
        gone = [name for name in _names(keys) if self._leave(name)]
        for start in range(0, len(gone), _BATCH_BLOCKS):
            yield BlockRemoved(gone[start : start + _BATCH_BLOCKS], _MEDIUM)

    def _take(self, name: int) -> bool:
        """One more data index holds a block. Returns whether it is the first."""
        count = self._holders.get(name, 0)
        self._holders[name] = count + 1
        return count == 0

    def _leave(self, name: int) -> bool:
        """A data index no longer holds a block. Returns whether none does now. Blocks from before
        a clearing are not known.
        """
        count = self._holders.get(name, 0)
        if count > 1:
            self._holders[name] = count - 1
        elif count == 1:
            del self._holders[name]
        return count == 1

    def _greet(self) -> None:
        """Somebody has subscribed or left. An empty batch is sent again and again, not numbered
        anew, so that subscriptions fill no place among the replays.
        """
        subscribed = self._sockets.publish.recv()[:1] == b"\x01"
        if subscribed and self._last_is_empty:
            self._publish(*self._sent[-1])
        elif subscribed:
            self._send([])

    def _publish(self, number: int, payload: bytes) -> None:
        self._sockets.publish.send_multipart((self._sockets.topic, number.to_bytes(8, "big"), payload))

    def _send(self, events: list[KVEvent]) -> None:
        payload = self._encoder.encode(KVEventBatch(time.time(), events))
        number, self._next = self._next, self._next + 1
        self._last_is_empty = not events
        self._publish(number, payload)
        self._sent.append((number, payload))
        self._sent_bytes += len(payload)
        while len(self._sent) > _REPLAY_BATCHES or self._sent_bytes > _REPLAY_BYTES:
            self._sent_bytes -= len(self._sent.popleft()[1])
        time.sleep(_BREATH)

    # ----------------------------------------------------------------- replays

    def _replay(self) -> None:
        """Answers one request. Where batches before those kept are asked for, the answer begins by
        clearing the mirror.
        """
        frames = self._sockets.replay.recv_multipart()
        if len(frames) != 3 or frames[1] or len(frames[2]) != 8:
            log.warning("kv_cache.events_replay: not understood: %d frames", len(frames))
            return
        peer, start = frames[0], int.from_bytes(frames[2], "big")
        oldest = self._sent[0][0]
        try:
            if start < oldest:
                clear = self._encoder.encode(KVEventBatch(time.time(), [AllBlocksCleared()]))
                self._answer(peer, (oldest - 1).to_bytes(8, "big"), clear)
            for count, (number, payload) in enumerate(self._sent):
                if number >= start:
                    self._answer(peer, number.to_bytes(8, "big"), payload)
                    if count % _BATCH_BLOCKS == 0:
                        time.sleep(_BREATH)
            self._answer(peer, END, b"")
        except zmq.ZMQError as error:
            log.warning("kv_cache.events_replay: a subscriber did not take its answer: %s", error)

    def _answer(self, peer: bytes, number: bytes, payload: bytes) -> None:
        frames = (peer, b"", self._sockets.topic if payload else b"", number, payload)
        self._sockets.replay.send_multipart(frames, zmq.DONTWAIT)


def _names(keys: UInt64) -> list[int]:
    """The hashes that routers know blocks by, of keys [n, 2]."""
    names: list[int] = keys[:, 0].tolist()
    return names


def _runs(ascending: list[int]) -> Iterator[tuple[int, int]]:
    """Spans [begin, end) of consecutive numbers, none longer than a batch."""
    begin = 0
    for index in range(1, len(ascending) + 1):
        whole = index - begin == _BATCH_BLOCKS
        if index == len(ascending) or whole or ascending[index] != ascending[index - 1] + 1:
            yield ascending[begin], ascending[index - 1] + 1
            begin = index
