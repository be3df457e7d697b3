"""Cache entries: the data a page holds for one token, by cache format. Imports no torch.

``fp32`` and ``bf16``: numbers. Grouped queries have two tensors, keys and values, with entries [K,
D]. Latents have one tensor with entries [C + E]: the normalised latent, then the rotated part of
the key.

``fp8``: bytes; a uint8 tensor replaces each of those. A value is its eight bits (e4m3) times a
float32 scale.

- Keys, and likewise values: K x D values, then a scale for each of the K heads: K (D + 4) bytes.
- Latents, as in FlashMLA (https://github.com/deepseek-ai/FlashMLA): C values, then a scale for
  every 128 of them (the last group may be shorter), then the E rotated values in bf16:
  C + 4 ceil(C / 128) + 2 E bytes, 656 at DeepSeek-V3's sizes.
- Index keys are keys of one head: D + 4 bytes.

A scale is the largest magnitude among its values / 448. It belongs to one token, so an entry is
written once and no later token changes it: a page's contents do not depend on how its tokens were
cut into steps. Values come first, so that pages of usual sizes can be read 16 bytes at a time. D
and C are multiples of 4, which aligns the scales for float32.

K key/value heads  D head dim  C latent dim  E rotated dims
"""

from __future__ import annotations

import math
from typing import Literal, get_args

KvFormat = Literal["fp32", "bf16", "fp8"]
Shape = tuple[int, ...]

GROUP = 128  # values of a latent that share a scale
SCALE_BYTES = 4
# DeepSeek's sparse attention: most bytes of index scores that are made at once, with what choosing
# makes of them, and of entries gathered for attention; on GPUs and on a CPU.
INDEX_BLOCK_BYTES, INDEX_BLOCK_BYTES_CPU = 256 << 20, 64 << 20
INDEX_SCORE_BYTES = 32  # per score, including the choice's temporaries; not measured
_ROTATED_BYTES = 2


def parse_format(name: str) -> KvFormat:
    """The format of that name. Raises ValueError for an unknown name."""
    formats: tuple[KvFormat, ...] = get_args(KvFormat)
    for known in formats:
        if name == known:
            return known
    raise ValueError(f"kv_cache.dtype = {name}: allowed are {', '.join(formats)}")


def head_entry(kv_format: KvFormat, num_heads: int, dim: int) -> Shape:
    """Shape of a token's keys, and of its values."""
    if kv_format != "fp8":
        return num_heads, dim
    _check_multiple("head_dim", dim)
    return (num_heads * (dim + SCALE_BYTES),)


def latent_entry(kv_format: KvFormat, latent_dim: int, rotated_dim: int) -> Shape:
    """Shape of a token's latent with its rotated part."""
    if kv_format != "fp8":
        return (latent_dim + rotated_dim,)
    _check_multiple("kv_lora_rank", latent_dim)
    return (latent_dim + SCALE_BYTES * num_groups(latent_dim) + _ROTATED_BYTES * rotated_dim,)


def index_entry(kv_format: KvFormat, dim: int) -> Shape:
    """Shape of a token's index key."""
    if kv_format == "fp8":
        _check_multiple("index_head_dim", dim)
    return head_entry(kv_format, 1, dim)


def entry_bytes(kv_format: KvFormat, shape: Shape) -> int:
    """Bytes of an entry of that shape."""
    return math.prod(shape) * {"fp32": 4, "bf16": 2, "fp8": 1}[kv_format]


def num_groups(latent_dim: int) -> int:
    """Number of scales of a latent."""
    return -(-latent_dim // GROUP)


def _check_multiple(field: str, dim: int) -> None:
    if dim % SCALE_BYTES:
        raise ValueError(
            f"kv_cache.dtype = fp8: {field} is {dim}; expected a multiple of {SCALE_BYTES}; use bf16 or fp32"
        )
