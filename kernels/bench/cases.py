"""The benchmark's cases: every op at every shape of a list fixed before a run, with the bytes and
operations that bound it.

An expert layer is the share of one of ``spread`` equal groups of experts under balanced load:
tokens x K pairs for its slots. The other cases have files of their own.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats.four_bit_format import INT4, MXFP4, NVFP4, FourBitFormat
from ..formats.fp8_format import BLOCK
from ..formats.kv_format import head_entry, latent_entry
from ..reference.column import Reference
from ..reference.four_bit import SCALE_DTYPES, FourBit
from ..reference.fp8 import Quantised, from_e4m3
from ..reference.gate import Routing
from ..reference.rope import HeadNorms, angles, frequencies
from .attention import attention_cases
from .call import PAGE_SIZE, Call, Case, random
from .indexer import indexer_cases
from .rivals import convert_e4m3, grouped_mm, one_by_one, scaled_grouped_mm, vllm_experts
from .sampler import sampler_cases

EXPERT_LAYERS = {
    "Qwen3-30B-A3B": (2048, 768, 128, 8, (1, 8, 32, 72)),
    "DeepSeek-V3": (7168, 2048, 256, 8, (8, 32, 72)),
}
FOUR_BIT_FORMATS = (INT4, MXFP4, NVFP4)
FOUR_BIT_TOKENS = (1, 16, 256, 4096)
EXPERT_TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
ROW_COUNTS = (1, 64, 4096)
# DeepSeek-V3: into the latents, out of the heads, and down in shared experts.
LINEAR_FP8 = (("latents", 7168, 2112), ("output", 16384, 7168), ("shared", 2048, 7168))
LINEAR_ROWS = (1, 2, 4, 8, 32, 128, 1024, 4096)
GATES = (("Qwen3", 128, Routing(8)), ("DeepSeek-V3", 256, Routing(8, "sigmoid", True, 2.5, 8, 4)))


def cases() -> Iterator[Case]:
    """All cases in the order of the rows; those with a goal come first."""
    yield from expert_cases()
    for rows in LINEAR_ROWS:
        size = f"{rows} rows, 2048 x 2048"
        yield Case("linear", size, _linear(rows, 2048, 2048), small=True, card=False)
    yield from attention_cases()
    yield from indexer_cases()
    yield from sampler_cases()
    for model, experts, rule in GATES:
        for tokens in ROW_COUNTS:
            yield Case("gate", f"{model}: {tokens} tokens", _gate(experts, rule, tokens), small=tokens <= 64)
    for rows in ROW_COUNTS:
        yield from _row_cases(rows)
        for name, inner, outer in LINEAR_FP8:
            size = f"{name}: {rows} x {inner} to {outer}"
            yield Case("linear_fp8", size, _linear_fp8(rows, inner, outer), small=rows == 1)
    yield Case("copy_pages", "64 pages of 64 x 576, 61 layers", _copy_pages, small=True)
    yield Case("add_time", "a launch", _add_time)
    yield Case("from_e4m3", "64 M values", _from_e4m3, small=True, card=False)


def expert_cases() -> Iterator[Case]:
    for model, (hidden, width, experts, top_k, spreads) in EXPERT_LAYERS.items():
        for spread in spreads:
            slots = -(-experts // spread)
            for tokens in EXPERT_TOKENS:
                layer = ExpertShape(slots, hidden, width, tokens * top_k)
                shape = f"{model} EP {spread}: {tokens} tokens, {slots} slots"
                small = model.startswith("Qwen") and spread == 8
                yield Case("experts", shape, layer.bf16, small=small and tokens <= 64)
                yield Case("experts_fp8", shape, layer.fp8, small=small and tokens in (1, 16))
                for format in FOUR_BIT_FORMATS if tokens in FOUR_BIT_TOKENS and spread == spreads[1] else ():
                    make = functools.partial(layer.four_bit, format)
                    few = small and tokens <= 256
                    yield Case("experts_four_bit", f"{format.name}, {shape}", make, small=few)


def _row_cases(rows: int) -> Iterator[Case]:
    small = rows == 64
    for hidden, width in ((2048, 768), (7168, 2048)):
        size = f"{rows} x {hidden}"
        yield Case("rms_norm", size, _rms_norm(rows, hidden), small)
        yield Case("add_rms_norm", size, _add_rms_norm(rows, hidden), small)
        yield Case("add_rms_norm_fp8", size, _add_rms_norm_fp8(rows, hidden), small)
        yield Case("quantise_rows", size, _quantise_rows(rows, hidden), small)
        yield Case("weighted_sum", f"{rows} x 8 x {hidden}", _weighted_sum(rows, hidden), small)
        yield Case("silu_mul", f"{rows} x {2 * width}", _silu_mul(rows, width), small)
        yield Case("silu_mul_fp8", f"{rows} x {2 * width}", _silu_mul_fp8(rows, width), small)
        yield Case("permute", f"{rows} x 8 rows of {hidden}, 16 slots", _permute(rows, hidden), small)
    yield Case("norm_rotate_and_write", f"Qwen3: {rows} tokens", _rotate_and_write(rows, "bf16"), small)
    yield Case(
        "norm_rotate_and_write", f"Qwen3, FP8 pages: {rows} tokens", _rotate_and_write(rows, "fp8"), small
    )
    yield Case("rotate_and_write_latent", f"DeepSeek-V3: {rows} tokens", _rotate_latent(rows, "bf16"), small)
    yield Case(
        "rotate_and_write_latent",
        f"DeepSeek-V3, FP8 pages: {rows} tokens",
        _rotate_latent(rows, "fp8"),
        small,
    )


def _linear(rows: int, width: int, hidden: int) -> Callable[[torch.device], Call]:
    """Calls take turns with a few weights, so that none is in a cache."""

    def make(device: torch.device) -> Call:
        x = random(device, rows, hidden)
        weights = [random(device, width, hidden) for _ in range(12)]

        from ..cpu.linear import linear, pack_for_onednn

        def in_turn(held: list[Tensor], multiply: Callable[..., Tensor]) -> Callable[[], object]:
            turns = itertools.cycle(held)
            return lambda: multiply(x, next(turns))

        num_bytes = 2.0 * (width * hidden + rows * (width + hidden))
        return Call(
            lambda ops: in_turn([ops.pack(weight) for weight in weights], ops.linear),
            num_bytes,
            2.0 * rows * width * hidden,
            rivals={"oneDNN": in_turn([pack_for_onednn(weight) for weight in weights], linear)},
            expected=lambda: F.linear(x, weights[0]),
        )

    return make


@dataclass(frozen=True)
class ExpertShape:
    """Pairs spread evenly over the slots, each with its own row."""

    slots: int
    hidden: int
    width: int
    pairs: int

    def bf16(self, device: torch.device) -> Call:
        x, w13, w2 = (random(device, *shape) for shape in self._shapes())
        rows, slots = self._pairs(device)

        def bind(ops: Reference) -> Callable[[], object]:
            counts = torch.zeros(self.slots, dtype=torch.int64, device=device)
            packed = ops.pack_slots(w13, w2)
            return lambda: ops.experts(x, rows, slots, *packed, counts)

        grouped = grouped_mm(x, slots, (w13, w2))
        rivals = {"torch._grouped_mm": grouped}
        if device.type == "cpu":
            rivals["oneDNN, slot by slot"] = one_by_one(x, rows, slots, w13, w2)
        else:
            rivals["vllm fused_moe"] = vllm_experts(x, slots, (w13, w2))
        return Call(bind, *self._least(2), rivals=rivals, expected=grouped)

    def fp8(self, device: torch.device) -> Call:
        x, w13, w2 = (random(device, *shape).to(torch.float8_e4m3fn) for shape in self._shapes())
        groups = (-(-self.hidden // BLOCK), -(-self.width // BLOCK))
        pairs = self._pairs(device)
        quantised = (
            Quantised(x, torch.full((self.pairs, groups[0]), 0.5, device=device)),
            Quantised(w13, torch.full((self.slots, 2, groups[1], groups[0]), 0.25, device=device)),
            Quantised(w2, torch.full((self.slots, groups[0], groups[1]), 2.0, device=device)),
        )

        def bind(ops: Reference) -> Callable[[], object]:
            counts = torch.zeros(self.slots, dtype=torch.int64, device=device)
            return lambda: ops.experts_fp8(
                quantised[0], pairs, quantised[1], quantised[2], counts, torch.bfloat16
            )

        if device.type == "cpu":  # a CPU has no such product
            return Call(bind, *self._least(1), fp8=True)
        rival = scaled_grouped_mm(x, pairs[1], (w13, w2), (0.5, 0.25, 2.0))
        return Call(
            bind,
            *self._least(1),
            fp8=True,
            rivals={"torch._scaled_grouped_mm by rows": rival},
            expected=rival,
        )

    def four_bit(self, format: FourBitFormat, device: torch.device) -> Call:
        """Weights of random codes, with scales and factors of 1."""
        x_shape, w13_shape, w2_shape = self._shapes()
        x = random(device, *x_shape)
        rows, slots = self._pairs(device)
        w13 = _codes(device, format, 2, *w13_shape)
        w2 = _codes(device, format, 1, *w2_shape)

        def bind(ops: Reference) -> Callable[[], object]:
            counts = torch.zeros(self.slots, dtype=torch.int64, device=device)
            packed = ops.pack_four_bit(w13), ops.pack_four_bit(w2)
            return lambda: ops.experts_four_bit(x, rows, slots, *packed, counts)

        num_bytes = min(self.slots, self.pairs) * format.expert_bytes(self.hidden, self.width)
        return Call(bind, num_bytes + 4.0 * self.pairs * self.hidden, self._least(2)[1])

    def _shapes(self) -> tuple[tuple[int, ...], ...]:
        return (
            (self.pairs, self.hidden),
            (self.slots, 2 * self.width, self.hidden),
            (self.slots, self.hidden, self.width),
        )

    def _pairs(self, device: torch.device) -> tuple[Tensor, Tensor]:
        index = torch.arange(self.pairs, device=device)
        return index, index * 7919 % self.slots  # a prime step, so that neighbours use different slots

    def _least(self, itemsize: int) -> tuple[float, float]:
        weights = min(self.slots, self.pairs) * 3 * self.hidden * self.width * itemsize
        return weights + self.pairs * self.hidden * (
            itemsize + 2
        ), 6.0 * self.pairs * self.hidden * self.width


def _codes(device: torch.device, format: FourBitFormat, parts: int, *shape: int) -> FourBit:
    slots, rows, columns = shape
    codes = torch.randint(256, (slots, rows, columns // 2), dtype=torch.uint8, device=device)
    scales = torch.ones(slots, rows, format.groups(columns), device=device).to(SCALE_DTYPES[format.scale])
    factors = torch.ones(slots, parts, device=device) if format.has_factor else None
    return FourBit(format, codes, scales, factors)


Make = Callable[[torch.device], Call]


def _gate(experts: int, rule: Routing, tokens: int) -> Make:
    def make(device: torch.device) -> Call:
        x = random(device, tokens, 2048)
        weight = random(device, experts, 2048)
        weight = weight if device.type == "cuda" else weight.float()  # as models hold it
        bias = torch.zeros(experts, device=device) if rule.scoring == "sigmoid" else None
        flops = 2.0 * tokens * experts * 2048
        return Call(
            lambda ops: lambda: ops.gate(x, weight, bias, rule),
            tokens * 4096.0 + experts * 2048.0 * weight.itemsize,
            flops,
        )

    return make


def _rms_norm(rows: int, hidden: int) -> Make:
    def make(device: torch.device) -> Call:
        x = random(device, rows, hidden)
        weight = random(device, hidden)
        return Call(lambda ops: lambda: ops.rms_norm(x, weight, 1e-6), rows * hidden * 4.0)

    return make


def _add_rms_norm(rows: int, hidden: int) -> Make:
    def make(device: torch.device) -> Call:
        x = random(device, rows, hidden)
        update = random(device, rows, hidden)
        weight = random(device, hidden)
        return Call(lambda ops: lambda: ops.add_rms_norm(x, update, weight, 1e-6), rows * hidden * 8.0)

    return make


def _add_rms_norm_fp8(rows: int, hidden: int) -> Make:
    def make(device: torch.device) -> Call:
        x = random(device, rows, hidden)
        update = random(device, rows, hidden)
        weight = random(device, hidden)
        return Call(lambda ops: lambda: ops.add_rms_norm_fp8(x, update, weight, 1e-6), rows * hidden * 7.0)

    return make


def _quantise_rows(rows: int, hidden: int) -> Make:
    def make(device: torch.device) -> Call:
        x = random(device, rows, hidden)
        return Call(lambda ops: lambda: ops.quantise_rows(x), rows * hidden * 3.0)

    return make


def _linear_fp8(rows: int, inner: int, outer: int) -> Make:
    def make(device: torch.device) -> Call:
        x = random(device, rows, inner)
        w = random(device, outer, inner).to(torch.float8_e4m3fn)
        scales = torch.full((-(-outer // BLOCK), -(-inner // BLOCK)), 0.5, device=device)
        num_bytes = outer * inner + 2.0 * rows * (inner + outer)
        return Call(
            lambda ops: lambda: ops.linear_fp8(x, w, None, scales),
            num_bytes,
            2.0 * rows * inner * outer,
            fp8=True,
        )

    return make


def _silu_mul(rows: int, width: int) -> Make:
    def make(device: torch.device) -> Call:
        x = random(device, rows, 2 * width)
        return Call(lambda ops: lambda: ops.silu_mul(x), rows * width * 6.0)

    return make


def _silu_mul_fp8(rows: int, width: int) -> Make:
    def make(device: torch.device) -> Call:
        x = random(device, rows, 2 * width)
        return Call(lambda ops: lambda: ops.silu_mul_fp8(x), rows * width * 5.0)

    return make


def _weighted_sum(rows: int, hidden: int) -> Make:
    def make(device: torch.device) -> Call:
        y = random(device, rows, 8, hidden)
        weights = torch.rand(rows, 8, device=device)
        return Call(lambda ops: lambda: ops.weighted_sum(y, weights), rows * hidden * 18.0)

    return make


def _permute(tokens: int, hidden: int) -> Make:
    """Groups, moves and moves back: the work of a transport that needs rows by slot."""

    def make(device: torch.device) -> Call:
        x = random(device, tokens, hidden)
        pairs = torch.arange(tokens * 8, device=device)
        rows, slots = pairs // 8, pairs * 7919 % 16

        def bind(ops: Reference) -> Callable[[], object]:
            counts = torch.zeros(16, dtype=torch.int64, device=device)

            def there_and_back() -> Tensor:
                grouping = ops.group_pairs(slots, counts, 16)
                return ops.unpermute(ops.permute(x, rows, grouping), grouping, len(pairs))

            return there_and_back

        return Call(bind, tokens * 8 * hidden * 8.0)

    return make


def _rotate_and_write(rows: int, kv_format: str) -> Make:
    def make(device: torch.device) -> Call:
        qkv = random(device, rows, 40, 128)
        norms = HeadNorms(random(device, 128), random(device, 128), 1e-6)
        entry = head_entry("fp8" if kv_format == "fp8" else "bf16", 4, 128)
        cache = (_cache(device, rows, entry), _cache(device, rows, entry))
        rotation = angles(torch.arange(rows, device=device), frequencies(128, 1e6).to(device))
        write = torch.randperm(rows, device=device)
        num_bytes = rows * (36 * 128 * 2.0 + 32 * 128 * 2 + 4 * 128 * 2) + sum(
            part.numel() * part.element_size() for part in cache
        )
        return Call(
            lambda ops: lambda: ops.norm_rotate_and_write(qkv, norms, rotation, cache, write, False),
            num_bytes,
        )

    return make


def _rotate_latent(rows: int, kv_format: str) -> Make:
    def make(device: torch.device) -> Call:
        q = random(device, rows, 128, 64)
        c = random(device, rows, 512)
        k = random(device, rows, 64)
        cache = _cache(device, rows, latent_entry("fp8" if kv_format == "fp8" else "bf16", 512, 64))
        rotation = angles(torch.arange(rows, device=device), frequencies(64, 1e4).to(device))
        write = torch.randperm(rows, device=device)
        num_bytes = rows * (128 * 64 * 4.0 + 576 * 2) + cache.numel() * cache.element_size()
        return Call(
            lambda ops: lambda: ops.rotate_and_write_latent(q, c, k, rotation, cache, write, True), num_bytes
        )

    return make


def _cache(device: torch.device, rows: int, entry: tuple[int, ...]) -> Tensor:
    """A cache of bytes for FP8 entries, which are one-dimensional (heads 528, latents 656), else of
    bf16.
    """
    dtype: Any = torch.uint8 if entry in ((528,), (656,)) else torch.bfloat16
    return torch.zeros(rows, *entry, dtype=dtype, device=device)


def _copy_pages(device: torch.device) -> Call:
    caches = [random(device, 256 * PAGE_SIZE, 576) for _ in range(61)]
    order = torch.randperm(256, device=device)
    return Call(
        lambda ops: lambda: ops.copy_pages(caches, order[:64], order[64:128], PAGE_SIZE),
        61 * 64 * PAGE_SIZE * 576 * 4.0,
    )


def _add_time(device: torch.device) -> Call:
    """The cost of a launch: of two for each wait that is timed."""
    totals = torch.zeros(8, dtype=torch.int64, device=device)
    return Call(lambda ops: lambda: ops.add_time(totals, 0, 1), 16.0)


def _from_e4m3(device: torch.device) -> Call:
    """Not an op of a column; the CPU column reads FP8 weights and pages with it."""
    bits = torch.randint(0, 126, (1 << 26,), dtype=torch.uint8, device=device)
    torch_own = convert_e4m3(bits)
    return Call(
        lambda ops: lambda: from_e4m3(bits, torch.bfloat16),
        bits.numel() * 3.0,
        rivals={"torch": torch_own},
        expected=torch_own,
    )
