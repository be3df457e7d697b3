"""Indexer cases: index keys are written and positions chosen, at DeepSeek-V3.2's sizes, bf16 and
FP8 pages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..formats.kv_format import KvFormat, index_entry
from ..reference.column import Reference
from ..reference.indexer import IndexNorm
from ..reference.kv_entries import encode_heads, gather_heads
from ..reference.paged import PagedBatch, Selection
from ..reference.rope import angles, frequencies
from .attention import batch_of, cache_of, made_once, positions_of
from .call import PAGE_SIZE, Call, Case, random

ROW_COUNTS = (1, 64, 4096)
CONTEXTS, BATCHES = (8192, 32768), (1, 8, 32, 128)
EXTENDS = ((2048, 8192), (256, 32768))  # tokens, cached prefix
_HEADS, _DIM, _ROTATED, _TOP_K = 64, 128, 64, 2048
_NAMES: dict[KvFormat, str] = {"bf16": "", "fp8": ", FP8 pages"}


def indexer_cases() -> Iterator[Case]:
    for kind, name in _NAMES.items():
        for rows in ROW_COUNTS:
            size = f"DeepSeek-V3.2{name}: {rows} tokens"
            yield Case("rotate_and_write_index", size, _written(rows, kind), small=rows == 64)
        for context in CONTEXTS:
            for batch in BATCHES:
                yield Case(
                    "select_positions",
                    f"DeepSeek-V3.2 decode{name}: {batch} x {context}",
                    _chosen(batch, context, 1, kind),
                    small=batch * context <= 8192,
                )
        for tokens, prefix in EXTENDS:
            yield Case(
                "select_positions",
                f"DeepSeek-V3.2 extend{name}: {tokens} over {prefix}",
                _chosen(1, tokens + prefix, tokens, kind),
            )


def _written(rows: int, kind: KvFormat) -> Callable[[torch.device], Call]:
    def make(device: torch.device) -> Call:
        q = random(device, rows, _HEADS, _DIM)
        k = random(device, rows, _DIM)
        norm = IndexNorm(random(device, _DIM), random(device, _DIM), 1e-6)
        cache = _keys(device, kind, rows)
        rotation = angles(torch.arange(rows, device=device), frequencies(_ROTATED, 1e4).to(device))
        write = torch.randperm(rows, device=device)
        num_bytes = 4.0 * q.numel() + 2.0 * k.numel() + cache.numel() * cache.element_size()
        return Call(
            lambda ops: lambda: ops.rotate_and_write_index(q, k, norm, rotation, cache, write), num_bytes
        )

    return make


def _chosen(rows: int, context: int, tokens: int, kind: KvFormat) -> Callable[[torch.device], Call]:
    """Every token sees more positions than it may choose."""

    def make(device: torch.device) -> Call:
        per_token = _DIM + 4 if kind == "fp8" else 2 * _DIM
        positions = positions_of(rows, context, per_token)
        cache = cache_of(positions, lambda count: _keys(device, kind, count))
        q = random(device, rows * tokens, _HEADS, _DIM)
        weights = random(device, rows * tokens, _HEADS).float()
        batch = batch_of(device, rows, context, tokens)

        def bind(ops: Reference) -> Callable[[], object]:
            return lambda: ops.select_positions(q, weights, cache, batch, _TOP_K)

        seen = rows * (tokens * (context - tokens) + tokens * (tokens + 1) / 2)
        num_bytes = rows * context * per_token + 2.0 * q.numel() + 8.0 * rows * tokens * _TOP_K
        rivals = {"topk over gathered keys": made_once(lambda: _gathered(q, weights, cache, batch, context))}
        return Call(bind, num_bytes, 2.0 * seen * _HEADS * _DIM, rivals=rivals if tokens == 1 else {})

    return make


def _gathered(
    q_RJI: Tensor, weights_RJ: Tensor, cache: Tensor, batch: PagedBatch, context: int
) -> Callable[[], Selection]:
    """Chooses for decode rows of equal length by torch's products and ``topk``; keys are gathered
    beforehand.
    """
    rows = len(q_RJI)
    keys = gather_heads(cache, batch.pages_RP.flatten(), PAGE_SIZE, _DIM, torch.bfloat16)
    keys_RLI = keys.view(rows, -1, _DIM)[:, :context].contiguous()
    tokens = torch.arange(rows, device=q_RJI.device)
    counts = torch.full((rows,), _TOP_K, dtype=torch.int32, device=q_RJI.device)

    def run() -> Selection:
        products_RJL = torch.bmm(q_RJI, keys_RLI.transpose(1, 2)).relu_()
        scores_RL = torch.bmm(weights_RJ[:, None].to(products_RJL.dtype), products_RJL)[:, 0]
        chosen_RK = scores_RL.topk(_TOP_K, 1).indices
        pages_RK = batch.pages_RP.long().gather(1, chosen_RK // PAGE_SIZE)
        return Selection(tokens, pages_RK * PAGE_SIZE + chosen_RK % PAGE_SIZE, counts, None, tokens[:0])

    return run


def _keys(device: torch.device, kind: KvFormat, count: int) -> Tensor:
    keys = random(device, count, 1, _DIM)
    return encode_heads(keys) if kind == "fp8" else keys.view(count, *index_entry(kind, _DIM))
