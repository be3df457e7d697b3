"""Attention cases: decode and extends, grouped queries at Qwen3-30B-A3B's sizes and latents at
DeepSeek-V3's, bf16 and FP8 pages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..formats.kv_format import head_entry, latent_entry
from ..reference.column import Reference
from ..reference.kv_entries import encode_heads, encode_latents, gather_heads, gather_latents
from ..reference.paged import PagedBatch, Selection, build_batch
from .call import PAGE_SIZE, Call, Case, random
from .rivals import by_library, sdpa

CONTEXTS, BATCHES = (1024, 8192, 32768), (1, 8, 32, 64, 128, 256)
EXTENDS = ((2048, 0), (2048, 8192), (256, 32768), (64, 8192))  # tokens, cached prefix
MAX_CACHE_BYTES = 30 << 30

Format = Literal["bf16", "fp8"]
_NAMES: dict[Format, str] = {"bf16": "", "fp8": ", FP8 pages"}
_HEADS, _KV_HEADS, _DIM = 32, 4, 128
_LATENT_HEADS, _NOPE, _ROPE, _VALUE, _LATENT = 128, 128, 64, 128, 512
_SCALE, _CHOSEN = 0.1, 2048


def attention_cases() -> Iterator[Case]:
    for context in CONTEXTS:
        for batch in BATCHES:
            small = batch * context <= 8192
            for kind, name in _NAMES.items():
                yield Case(
                    "attend",
                    f"Qwen3 decode{name}: {batch} x {context}",
                    _heads(batch, context, 1, kind),
                    small,
                )
                yield Case(
                    "mla_attend",
                    f"DeepSeek-V3 decode{name}: {batch} x {context}",
                    _latents(batch, context, 1, kind),
                    small,
                )
    for batch in BATCHES:
        shape = f"DeepSeek-V3.2 decode, FP8 pages: {batch} x {_CHOSEN} of {CONTEXTS[-1]}"
        yield Case("mla_attend_selected", shape, _chosen_latents(batch, CONTEXTS[-1]))
    for tokens, prefix in EXTENDS:
        for kind, name in _NAMES.items():
            shape = f"{tokens} over {prefix}"
            yield Case(
                "attend",
                f"Qwen3 extend{name}: {shape}",
                _heads(1, tokens + prefix, tokens, kind),
                small=prefix == 0,
            )
            yield Case(
                "mla_attend",
                f"DeepSeek-V3 extend{name}: {shape}",
                _latents(1, tokens + prefix, tokens, kind),
                small=prefix == 0,
            )


def _heads(rows: int, context: int, tokens: int, kind: Format) -> Callable[[torch.device], Call]:
    def make(device: torch.device) -> Call:
        entry = head_entry(kind, _KV_HEADS, _DIM)
        per_token = 2 * int(np.prod(entry)) * (1 if kind == "fp8" else 2)
        positions = positions_of(rows, context, per_token)
        k, v = (cache_of(positions, lambda count: _entries_of_heads(device, kind, count)) for _ in range(2))
        q = random(device, rows * tokens, _HEADS, _DIM)
        batch = batch_of(device, rows, context, tokens)

        def gathered() -> Callable[[], object]:
            k_RKLD, v_RKLD = (
                gather_heads(cache, batch.pages_RP.flatten(), PAGE_SIZE, _DIM, torch.bfloat16)
                .view(rows, -1, _KV_HEADS, _DIM)[:, :context]
                .transpose(1, 2)
                .contiguous()
                for cache in (k, v)
            )
            group = _HEADS // _KV_HEADS
            if tokens == 1:
                return sdpa(q.view(rows, _KV_HEADS, group, _DIM), k_RKLD, v_RKLD, _SCALE)
            k_RHLD, v_RHLD = (x.repeat_interleave(group, 1) for x in (k_RKLD, v_RKLD))
            return sdpa(q.transpose(0, 1)[None], k_RHLD, v_RHLD, _SCALE, causal=True)

        # Over a prefix torch would need a mask as large as the scores; the reference masks block by
        # block.
        rivals = {"sdpa on gathered pages": made_once(gathered)} if tokens in (1, context) else {}

        def bind(ops: Reference) -> Callable[[], object]:
            return lambda: ops.attend(q, k, v, batch, _SCALE)

        if device.type == "cuda" and kind == "bf16" and tokens == 1:
            rivals["FlashInfer"] = by_library(bind, device, "flashinfer")
        elif device.type == "cuda" and kind == "bf16":
            rivals["FlashAttention-4"] = by_library(bind, device, "flash_attn_4", "prompt_attention")
        seen = rows * (tokens * (context - tokens) + tokens * (tokens + 1) / 2)
        num_bytes = rows * context * per_token + 4.0 * q.numel()
        return Call(
            bind,
            num_bytes,
            4.0 * seen * _HEADS * _DIM,
            rivals=rivals,
        )

    return make


def _latents(rows: int, context: int, tokens: int, kind: Format) -> Callable[[torch.device], Call]:
    def make(device: torch.device) -> Call:
        per_token = latent_entry(kind, _LATENT, _ROPE)[0] * (1 if kind == "fp8" else 2)
        positions = positions_of(rows, context, per_token)
        cache = cache_of(positions, lambda count: _entries_of_latents(device, kind, count))
        q_nope, q_rope = (random(device, rows * tokens, _LATENT_HEADS, dim) for dim in (_NOPE, _ROPE))
        expand = random(device, _LATENT_HEADS, _NOPE + _VALUE, _LATENT)
        batch = batch_of(device, rows, context, tokens)

        def bind(ops: Reference) -> Callable[[], object]:
            return lambda: ops.mla_attend(q_nope, q_rope, cache, expand, batch, _SCALE)

        def gathered() -> Callable[[], object]:
            """Leaves out the two products around it. Whole entries serve as values, since the fused
            kernels need equal widths.
            """
            dim = _LATENT + _ROPE
            latents = gather_latents(cache, batch.pages_RP.flatten(), PAGE_SIZE, _LATENT, torch.bfloat16)
            latents = latents.view(rows, 1, -1, dim)[:, :, :context]
            return sdpa(random(device, rows, 1, _LATENT_HEADS, dim), latents, latents, _SCALE)

        rivals = {"sdpa on gathered pages": made_once(gathered)} if tokens == 1 else {}
        if device.type == "cuda" and kind == "bf16" and tokens == 1:
            rivals["FlashMLA"] = by_library(bind, device, "flashmla")
        num_bytes = (
            rows * context * per_token
            + 2.0 * expand.numel()
            + 2.0 * rows * tokens * _LATENT_HEADS * (_NOPE + _ROPE + _VALUE)
        )
        return Call(bind, num_bytes, _latent_flops(rows, context, tokens), rivals=rivals)

    return make


def _chosen_latents(rows: int, context: int) -> Callable[[torch.device], Call]:
    """Each row looks at as many positions of its pages as DeepSeek-V3.2's indexer chooses."""

    def make(device: torch.device) -> Call:
        per_token = latent_entry("fp8", _LATENT, _ROPE)[0]
        positions = positions_of(rows, context, per_token)
        cache = cache_of(positions, lambda count: _entries_of_latents(device, "fp8", count))
        q_nope, q_rope = (random(device, rows, _LATENT_HEADS, dim) for dim in (_NOPE, _ROPE))
        expand = random(device, _LATENT_HEADS, _NOPE + _VALUE, _LATENT)
        batch = batch_of(device, rows, context, 1)
        tokens_N = torch.arange(rows, device=device)
        at_NK = torch.rand(rows, context, device=device).topk(_CHOSEN).indices.sort().values
        pages_NK = batch.pages_RP.long().gather(1, at_NK // PAGE_SIZE)
        counts_N = torch.full((rows,), _CHOSEN, dtype=torch.int32, device=device)
        places_NK = pages_NK * PAGE_SIZE + at_NK % PAGE_SIZE
        selection = Selection(tokens_N, places_NK, counts_N, None, tokens_N[:0])

        def bind(ops: Reference) -> Callable[[], object]:
            return lambda: ops.mla_attend_selected(q_nope, q_rope, cache, expand, batch, _SCALE, selection)

        rivals = {"FlashMLA": by_library(bind, device, "flashmla")} if device.type == "cuda" else {}
        num_bytes = (
            rows * _CHOSEN * per_token
            + 2.0 * expand.numel()
            + 2.0 * rows * _LATENT_HEADS * (_NOPE + _ROPE + _VALUE)
        )
        return Call(bind, num_bytes, _latent_flops(rows, _CHOSEN, 1), rivals=rivals)

    return make


def _latent_flops(rows: int, context: int, tokens: int) -> float:
    """Operations of the cheaper of the two forms."""
    seen = rows * (tokens * (context - tokens) + tokens * (tokens + 1) / 2)
    absorbed = 2.0 * seen * (2 * _LATENT + _ROPE) + 2.0 * rows * tokens * _LATENT * (_NOPE + _VALUE)
    expanded = 2.0 * seen * (_NOPE + _ROPE + _VALUE) + 2.0 * rows * context * _LATENT * (_NOPE + _VALUE)
    return _LATENT_HEADS * min(absorbed, expanded)


def made_once(make: Callable[[], Callable[[], object]]) -> Callable[[], object]:
    """Runs the function that ``make`` returns; calls ``make`` on the first run."""
    made: list[Callable[[], object]] = []

    def run() -> object:
        if not made:
            made.append(make())
        return made[0]()

    return run


def positions_of(rows: int, context: int, bytes_per_token: int) -> int:
    """Number of cache positions. Raises MemoryError if a card could not hold them beside a gathered
    copy.
    """
    positions = rows * -(-context // PAGE_SIZE) * PAGE_SIZE
    if positions * bytes_per_token > MAX_CACHE_BYTES:
        raise MemoryError(f"{positions} positions of {bytes_per_token} bytes")
    return positions


def batch_of(device: torch.device, rows: int, context: int, tokens: int) -> PagedBatch:
    """Rows of ``context`` positions, the last ``tokens`` of them in this step. Pages are in random
    order.
    """
    pages_per_row = -(-context // PAGE_SIZE)
    order = np.random.default_rng(0).permutation(rows * pages_per_row)
    pages = order.astype(np.int32).reshape(rows, pages_per_row)
    starts = np.full(rows, context - tokens)
    counts = np.full(rows, tokens)
    return build_batch(starts, counts, rows if tokens == 1 else 0, pages, PAGE_SIZE, device)[0]


def cache_of(positions: int, entries: Callable[[int], Tensor]) -> Tensor:
    """A cache of random entries, with a part repeated: encoding to FP8 takes eight times an entry's
    memory.
    """
    part = entries(min(positions, 1 << 16))
    if len(part) == positions:
        return part
    return part.repeat(-(-positions // len(part)), *[1] * (part.dim() - 1))[:positions]


def _entries_of_heads(device: torch.device, kind: Format, count: int) -> Tensor:
    x = random(device, count, _KV_HEADS, _DIM)
    return encode_heads(x) if kind == "fp8" else x


def _entries_of_latents(device: torch.device, kind: Format, count: int) -> Tensor:
    x = random(device, count, _LATENT + _ROPE)
    return encode_latents(x[:, :_LATENT], x[:, _LATENT:]) if kind == "fp8" else x
