"""What is benchmarked: every op at every shape of the list, fixed before a run, with the bytes and operations that bound it.

An expert layer is what one of ``spread`` equal shares of the experts sees under balanced load: tokens x K pairs for its slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .fp8 import Quantised
from .gate import Routing
from .paged import PagedBatch, build_batch
from .rope import angles, frequencies
from .sampling import SamplingParams
from .table import Ops

EXPERT_LAYERS = {"Qwen3-30B-A3B": (2048, 768, 128, 8, (1, 8, 32, 72)), "DeepSeek-V3": (7168, 2048, 256, 8, (8, 32, 72))}
EXPERT_TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
DECODE_CONTEXTS, DECODE_BATCHES = (1024, 8192, 32768), (1, 8, 32, 64, 128, 256)
EXTENDS = ((2048, 0), (2048, 8192), (256, 32768))  # tokens, cached prefix
SAMPLER_BATCHES, VOCABULARY = (1, 16, 64, 256), 152064
ROW_COUNTS = (1, 64, 4096)
PAGE_SIZE = 64
MAX_CACHE_BYTES = 40 << 30


@dataclass(frozen=True)
class Call:
    """An op on tensors that lie ready. ``num_bytes`` must be moved and ``flops`` done at least; ``rivals`` do the same otherwise."""

    run: Callable[[Ops], object]
    num_bytes: float
    flops: float = 0.0
    fp8: bool = False
    rivals: dict[str, Callable[[], object]] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """``make`` lays out the tensors on a device. ``small``: fit to run on a CPU, too."""

    op: str
    shape: str
    make: Callable[[torch.device], Call]
    small: bool = False


def cases() -> Iterator[Case]:
    """All of them, in the order of the rows."""
    for model, (hidden, width, experts, top_k, spreads) in EXPERT_LAYERS.items():
        for spread in spreads:
            slots = -(-experts // spread)
            for tokens in EXPERT_TOKENS:
                layer = ExpertShape(slots, hidden, width, tokens * top_k)
                shape = f"{model} EP {spread}: {tokens} tokens, {slots} slots"
                yield Case("experts", shape, layer.bf16, small=model.startswith("Qwen") and spread == 8 and tokens <= 64)
                yield Case("experts_fp8", shape, layer.fp8)
    for model, experts, rule in (("Qwen3", 128, Routing(8)), ("DeepSeek-V3", 256, Routing(8, "sigmoid", True, 2.5, 8, 4))):
        for tokens in ROW_COUNTS:
            yield Case("gate", f"{model}: {tokens} tokens", _gate(experts, rule, tokens), small=tokens <= 64)
    for context in DECODE_CONTEXTS:
        for batch in DECODE_BATCHES:
            yield Case("attend", f"Qwen3 decode: {batch} x {context}", _gqa_decode(batch, context), small=batch * context <= 8192)
            yield Case("mla_attend", f"DeepSeek-V3 decode: {batch} x {context}", _mla_decode(batch, context), small=batch * context <= 8192)
    for tokens, prefix in EXTENDS:
        yield Case("attend", f"Qwen3 extend: {tokens} over {prefix}", _gqa_extend(tokens, prefix), small=prefix == 0)
    for batch in SAMPLER_BATCHES:
        for name, row in {"greedy": (0.0, 0, 1.0, 0.0), "plain": (1.0, 0, 1.0, 0.0), "top-k 50, top-p 0.9": (0.8, 50, 0.9, 0.0)}.items():
            yield Case("sample", f"{batch} x {VOCABULARY}, {name}", _sampler(batch, row), small=batch == 16)
    for rows in ROW_COUNTS:
        for hidden in (2048, 7168):
            yield Case("add_rms_norm", f"{rows} x {hidden}", _add_rms_norm(rows, hidden), small=rows == 64)
            yield Case("add_rms_norm_fp8", f"{rows} x {hidden}", _add_rms_norm_fp8(rows, hidden), small=rows == 64)
            yield Case("weighted_sum", f"{rows} x 8 x {hidden}", _weighted_sum(rows, hidden), small=rows == 64)
        yield Case("rotate_and_write", f"Qwen3: {rows} tokens", _rotate_and_write(rows), small=rows == 64)
    yield Case("copy_pages", "64 pages of 64 x 576, 61 layers", _copy_pages)


@dataclass(frozen=True)
class ExpertShape:
    """Pairs spread evenly over the slots, each with a row of its own."""

    slots: int
    hidden: int
    width: int
    pairs: int

    def bf16(self, device: torch.device) -> Call:
        x, w13, w2 = (_random(device, *shape) for shape in self._shapes())
        rows, slots = self._pairs(device)
        counts = torch.zeros(self.slots, dtype=torch.int64, device=device)
        ends = torch.bincount(slots, minlength=self.slots).cumsum(0).to(torch.int32)
        order = slots.argsort(stable=True)

        def grouped_mm() -> Tensor:
            gate, up = torch._grouped_mm(x[order], w13.transpose(1, 2), offs=ends).chunk(2, -1)
            return torch.empty_like(x).index_copy_(0, order, torch._grouped_mm(F.silu(gate) * up, w2.transpose(1, 2), offs=ends))

        return Call(lambda ops: ops.experts(x, rows, slots, w13, w2, counts), *self._least(2), rivals={"torch._grouped_mm": grouped_mm})

    def fp8(self, device: torch.device) -> Call:
        x, w13, w2 = (_random(device, *shape).to(torch.float8_e4m3fn) for shape in self._shapes())
        groups = (-(-self.hidden // 128), -(-self.width // 128))
        pairs = self._pairs(device)
        counts = torch.zeros(self.slots, dtype=torch.int64, device=device)
        quantised = (
            Quantised(x, torch.ones(self.pairs, groups[0], device=device)),
            Quantised(w13, torch.ones(self.slots, 2, groups[1], groups[0], device=device)),
            Quantised(w2, torch.ones(self.slots, groups[0], groups[1], device=device)),
        )
        return Call(
            lambda ops: ops.experts_fp8(quantised[0], pairs, quantised[1], quantised[2], counts, torch.bfloat16), *self._least(1), fp8=True
        )

    def _shapes(self) -> tuple[tuple[int, ...], ...]:
        return (self.pairs, self.hidden), (self.slots, 2 * self.width, self.hidden), (self.slots, self.hidden, self.width)

    def _pairs(self, device: torch.device) -> tuple[Tensor, Tensor]:
        index = torch.arange(self.pairs, device=device)
        return index, index * 7919 % self.slots  # a prime step: neighbours meet different slots

    def _least(self, itemsize: int) -> tuple[float, float]:
        weights = min(self.slots, self.pairs) * 3 * self.hidden * self.width * itemsize
        return weights + self.pairs * self.hidden * (itemsize + 2), 6.0 * self.pairs * self.hidden * self.width


def _random(device: torch.device, *shape: int) -> Tensor:
    """bf16, of one size in all tensors: not zero, because zeros draw less power."""
    return torch.empty(shape, dtype=torch.bfloat16, device=device).uniform_(-0.1, 0.1)


def _gate(experts: int, rule: Routing, tokens: int) -> Callable[[torch.device], Call]:
    def make(device: torch.device) -> Call:
        x, weight = _random(device, tokens, 2048), _random(device, experts, 2048).float()
        bias = torch.zeros(experts, device=device) if rule.scoring == "sigmoid" else None
        return Call(lambda ops: ops.gate(x, weight, bias, rule), tokens * 2048 * 2 + experts * 2048 * 4, 2.0 * tokens * experts * 2048)

    return make


def _batch(device: torch.device, rows: int, context: int, tokens: int) -> PagedBatch:
    """Rows of ``context`` positions, the last ``tokens`` of them in this step; pages in no order."""
    pages_per_row = -(-context // PAGE_SIZE)
    pages = np.random.default_rng(0).permutation(rows * pages_per_row).astype(np.int32).reshape(rows, pages_per_row)
    starts, counts = np.full(rows, context - tokens), np.full(rows, tokens)
    return build_batch(starts, counts, rows if tokens == 1 else 0, pages, PAGE_SIZE, device)[0]


def _cache_rows(rows: int, context: int, bytes_per_token: int) -> int:
    """Cache positions, refused where no card would hold them."""
    positions = rows * -(-context // PAGE_SIZE) * PAGE_SIZE
    if positions * bytes_per_token > MAX_CACHE_BYTES:
        raise MemoryError(f"{positions} positions of {bytes_per_token} bytes")
    return positions


def _gqa_decode(rows: int, context: int) -> Callable[[torch.device], Call]:
    def make(device: torch.device) -> Call:
        k, v = (_random(device, _cache_rows(rows, context, 2048), 4, 128) for _ in range(2))
        q, batch = _random(device, rows, 32, 128), _batch(device, rows, context, 1)
        return Call(lambda ops: ops.attend(q, k, v, batch, 0.1), rows * context * 2048.0, 4.0 * rows * context * 32 * 128)

    return make


def _gqa_extend(tokens: int, prefix: int) -> Callable[[torch.device], Call]:
    def make(device: torch.device) -> Call:
        context = tokens + prefix
        k, v = (_random(device, _cache_rows(1, context, 2048), 4, 128) for _ in range(2))
        q, batch = _random(device, tokens, 32, 128), _batch(device, 1, context, tokens)
        seen = tokens * prefix + tokens * (tokens + 1) / 2
        return Call(lambda ops: ops.attend(q, k, v, batch, 0.1), context * 2048.0, 4.0 * seen * 32 * 128)

    return make


def _mla_decode(rows: int, context: int) -> Callable[[torch.device], Call]:
    def make(device: torch.device) -> Call:
        cache = _random(device, _cache_rows(rows, context, 1152), 576)
        q_nope, q_rope, expand = _random(device, rows, 128, 128), _random(device, rows, 128, 64), _random(device, 128, 256, 512)
        batch = _batch(device, rows, context, 1)
        flops = 2.0 * rows * context * 128 * (576 + 512) + 2.0 * rows * expand.numel()
        return Call(
            lambda ops: ops.mla_attend(q_nope, q_rope, cache, expand, batch, 0.1), rows * context * 1152.0 + expand.numel() * 2, flops
        )

    return make


def _sampler(rows: int, row: tuple[float, int, float, float]) -> Callable[[torch.device], Call]:
    def make(device: torch.device) -> Call:
        logits = torch.empty(rows, VOCABULARY, device=device).normal_(0, 3)
        dtypes = (np.float32, np.int64, np.float32, np.float32)
        params = SamplingParams(*(np.full(rows, value, dtype) for value, dtype in zip(row, dtypes, strict=True)))
        uniform_R = (np.arange(rows) + 0.5) / rows
        return Call(lambda ops: ops.sample(logits, params, uniform_R), rows * VOCABULARY * 4.0)

    return make


def _add_rms_norm(rows: int, hidden: int) -> Callable[[torch.device], Call]:
    def make(device: torch.device) -> Call:
        x, update, weight = _random(device, rows, hidden), _random(device, rows, hidden), _random(device, hidden)
        return Call(lambda ops: ops.add_rms_norm(x, update, weight, 1e-6), rows * hidden * 8.0)

    return make


def _add_rms_norm_fp8(rows: int, hidden: int) -> Callable[[torch.device], Call]:
    def make(device: torch.device) -> Call:
        x, update, weight = _random(device, rows, hidden), _random(device, rows, hidden), _random(device, hidden)
        return Call(lambda ops: ops.add_rms_norm_fp8(x, update, weight, 1e-6), rows * hidden * 7.0)

    return make


def _weighted_sum(rows: int, hidden: int) -> Callable[[torch.device], Call]:
    def make(device: torch.device) -> Call:
        y, weights = _random(device, rows, 8, hidden), torch.rand(rows, 8, device=device)
        return Call(lambda ops: ops.weighted_sum(y, weights), rows * hidden * 18.0)

    return make


def _rotate_and_write(rows: int) -> Callable[[torch.device], Call]:
    def make(device: torch.device) -> Call:
        q, k, v = (_random(device, rows, heads, 128) for heads in (32, 4, 4))
        cache = (_random(device, rows, 4, 128), _random(device, rows, 4, 128))
        rotation = angles(torch.arange(rows, device=device), frequencies(128, 1e6).to(device))
        write = torch.randperm(rows, device=device)
        return Call(lambda ops: ops.rotate_and_write(q, k, v, rotation, cache, write, False), rows * 40 * 128 * 4.0)

    return make


def _copy_pages(device: torch.device) -> Call:
    caches = [_random(device, 256 * PAGE_SIZE, 576) for _ in range(61)]
    order = torch.randperm(256, device=device)
    return Call(lambda ops: ops.copy_pages(caches, order[:64], order[64:128], PAGE_SIZE), 61 * 64 * PAGE_SIZE * 576 * 4.0)
