"""A router outside that mirrors the block index of a cluster, as vLLM documents it.

The types decode what https://docs.vllm.ai/en/latest/examples/features/kv_events/ describes: a batch
is an array, an event a map with its type. A gap in the numbers is closed by a replay.
"""

from __future__ import annotations

import socket
import time
from types import TracebackType
from typing import Any

import msgspec
import zmq

END = (-1).to_bytes(8, "big", signed=True)


class EventBatch(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    ts: float
    events: list[Any]
    data_parallel_rank: int | None = None


class KVCacheEvent(msgspec.Struct, omit_defaults=True, gc=False, tag=True):
    """Base of the events; ``type`` holds the name of the class."""


class BlockStored(KVCacheEvent):
    block_hashes: list[bytes | int]
    parent_block_hash: bytes | int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[Any, ...] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None


class BlockRemoved(KVCacheEvent):
    block_hashes: list[bytes | int]
    medium: str | None
    group_idx: int | None = None
    locality: str | None = None


class AllBlocksCleared(KVCacheEvent):
    pass


class KVEventBatch(EventBatch):
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def name_of(hash_h128: bytes) -> int:
    """The number that events name a block by."""
    return int.from_bytes(hash_h128[:8], "little")


class KVRouter:
    """Follows a cluster. ``mirror`` has the tokens and the parent of every block."""

    def __init__(self, address: str, replay_address: str, topic: str = "") -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._sub = self._context.socket(zmq.SUB)
        self._sub.subscribe(topic)
        self._sub.connect(address)
        self._replay_address = replay_address
        self._topic = topic.encode()
        self._decoder = msgspec.msgpack.Decoder(KVEventBatch)
        self.mirror: dict[bytes | int, tuple[bytes | int | None, list[int]]] = {}
        self.last = -1
        self.gaps = self.cleared = 0
        self.ignored_removals = 0

    def __enter__(self) -> KVRouter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sub.close(0)
        self._context.term()

    def follow(self, seconds: float) -> bool:
        """Takes one live batch. Returns whether one came within ``seconds``."""
        if not self._sub.poll(int(1000 * seconds)):
            return False
        topic, number, payload = self._sub.recv_multipart()
        assert topic == self._topic
        sequence = int.from_bytes(number, "big")
        if sequence > self.last + 1:
            self.gaps += 1
            self.catch_up()
        self._take(sequence, payload)
        return True

    def lose(self, seconds: float) -> int:
        """Throws one live batch away. Returns its number, -1 if none came."""
        if not self._sub.poll(int(1000 * seconds)):
            return -1
        return int.from_bytes(self._sub.recv_multipart()[1], "big")

    def drain(self, quiet: float = 0.3) -> None:
        """Follows until nothing has come for ``quiet`` seconds."""
        while self.follow(quiet):
            pass

    def catch_up(self, seconds: float = 10.0) -> list[int]:
        """Asks for everything after the last number. Returns the numbers of the answer."""
        replay = self._context.socket(zmq.DEALER)
        replay.connect(self._replay_address)
        replay.send_multipart([b"", (self.last + 1).to_bytes(8, "big")])
        numbers = []
        end = time.monotonic() + seconds
        while True:
            left = max(0.0, end - time.monotonic())
            assert replay.poll(int(1000 * left)), f"no end of a replay within {seconds:g} s"
            empty, topic, number, payload = replay.recv_multipart()
            assert empty == b""
            if number == END:
                assert payload == b""
                break
            assert topic == self._topic
            numbers.append(int.from_bytes(number, "big"))
            self._take(numbers[-1], payload)
        replay.close(0)
        return numbers

    def _take(self, sequence: int, payload: bytes) -> None:
        if sequence <= self.last:
            return
        batch = self._decoder.decode(payload)
        assert abs(batch.ts - time.time()) < 3600 and batch.data_parallel_rank == 0
        for event in batch.events:
            if isinstance(event, AllBlocksCleared):
                self.cleared += 1
                self.mirror.clear()
            elif isinstance(event, BlockRemoved):
                for name in event.block_hashes:
                    self.ignored_removals += self.mirror.pop(name, None) is None
            else:
                self._store(event)
        self.last = sequence

    def _store(self, event: BlockStored) -> None:
        assert len(event.token_ids) == len(event.block_hashes) * event.block_size
        assert event.medium == "GPU" and event.lora_id is None and event.lora_name is None
        parent = event.parent_block_hash
        for index, name in enumerate(event.block_hashes):
            assert name not in self.mirror, "a block is stored twice"
            start = index * event.block_size
            self.mirror[name] = parent, event.token_ids[start : start + event.block_size]
            parent = name
