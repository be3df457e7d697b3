"""Messages to routers outside that mirror the block index, in vLLM's wire format.

Three frames: the topic, the sequence number of the batch (8 bytes, big-endian), the batch as
msgpack. A batch is an array, each event a map with its name under ``type``, as in vLLM 0.26
(https://github.com/vllm-project/vllm/pull/42892, replays pull/45177). Fields and replay follow
``vllm/distributed/kv_events.py`` and ``examples/features/kv_events/kv_events_subscriber.py`` there.

A replay is asked for with an empty frame and the first number wanted. Each batch is answered by an
empty frame and its three frames; ``END`` in place of a number ends the answer.
"""

from __future__ import annotations

import msgspec

END = b"\xff" * 8


class BlockStored(msgspec.Struct, frozen=True, omit_defaults=True, tag=True):
    """Blocks that can be had from the cache from now on. Hashes are the first 64 bits of ours;
    ``token_ids`` are those of all blocks, ``block_size`` of each. ``parent_block_hash`` names the
    block before the first; None at the start of a prompt.
    """

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None


class BlockRemoved(msgspec.Struct, frozen=True, omit_defaults=True, tag=True):
    """Blocks that cannot be had any more."""

    block_hashes: list[int]
    medium: str | None


class AllBlocksCleared(msgspec.Struct, frozen=True, omit_defaults=True, tag=True):
    """Every block known so far is to be forgotten."""


KVEvent = BlockStored | BlockRemoved | AllBlocksCleared


class KVEventBatch(msgspec.Struct, frozen=True, array_like=True):
    """Events in their order; ``ts`` is seconds since 1970. A cluster is one source, number 0."""

    ts: float
    events: list[KVEvent]
    data_parallel_rank: int = 0
