"""Compiles the Triton kernels for a card that is not there, at the sizes of real models, and says
what each one needs.

Run as a program with a kind of card (90), without TRITON_INTERPRET: reads names of cases, one a
line, and answers each with a line of JSON, {kernel: [{shared, registers, spilled, ...}]} or the
text of an error. Launches stop after compiling (``warmup``), so nothing is executed; large tensors
are reserved and never touched. Whatever would read a value of a tensor on the host fails, as it
would while a step is captured.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from lockstep.kernels.activation import Activation
from lockstep.kernels.bench.compile import AbsentCard
from lockstep.kernels.formats.four_bit_format import INT4, MXFP4, NVFP4, FourBitFormat
from lockstep.kernels.formats.kv_format import head_entry, index_entry, latent_entry
from lockstep.kernels.reference.attention import AttentionRule
from lockstep.kernels.reference.experts import ExpertForm
from lockstep.kernels.reference.four_bit import SCALE_DTYPES, FourBit
from lockstep.kernels.reference.fp8 import Quantised
from lockstep.kernels.reference.gate import GateCounts, Routing
from lockstep.kernels.reference.indexer import IndexNorm
from lockstep.kernels.reference.paged import PagedBatch
from lockstep.kernels.reference.rope import Angles
from lockstep.kernels.reference.sampling import Purpose, SamplingParams, SlotSampling
from lockstep.kernels.triton import (
    attention as triton_attention,
    clock as triton_clock,
    draw as triton_draw,
    experts as triton_experts,
    experts_four_bit as triton_experts_four_bit,
    experts_fp8 as triton_experts_fp8,
    fp8 as triton_fp8,
    gate as triton_gate,
    grouping as triton_grouping,
    indexer as triton_indexer,
    linear_fp8 as triton_linear_fp8,
    mla as triton_mla,
    norm as triton_norm,
    pages as triton_pages,
    rope as triton_rope,
    sampling as triton_sampling,
)
from lockstep.kernels.triton.tiles import Tiles, default_tiles

BF16 = torch.bfloat16
HOST_READS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")
MATRIX_UNITS = ("wgmma", "mma.sync", "tcgen05.mma")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def main() -> None:
    compiled: dict[str, list[Any]] = {}
    run = JITFunction.run

    def only_compile(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        found = compiled.setdefault(f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}", [])
        if kernel not in found:
            found.append(kernel)
        return kernel

    driver.set_active(AbsentCard(int(sys.argv[1])))
    JITFunction.run = only_compile
    for name in HOST_READS:
        setattr(torch.Tensor, name, refuse)
    for line in sys.stdin:
        compiled.clear()
        try:
            CASES[line.strip()]()
            answer: Any = {name: [needs(kernel) for kernel in kernels] for name, kernels in compiled.items()}
        except Exception:
            answer = traceback.format_exc()
        print(json.dumps(answer), flush=True)


def refuse(*args: Any, **options: Any) -> Any:
    raise AssertionError("a value of a tensor was read on the host")


def needs(kernel: Any) -> dict[str, Any]:
    """Shared memory in bytes (the part asked for at launch), registers and spilled bytes per
    thread, the kinds of matrix instructions, and the eight-bit values that a program widens where
    each instruction runs once.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {
        "shared": kernel.metadata.shared,
        "registers": usage["REG"],
        "spilled": usage["STACK"] + usage["LOCAL"],
        "warps": kernel.metadata.num_warps,
        "units": [unit for unit in MATRIX_UNITS if unit in kernel.asm["ptx"]],
        "widened": kernel.asm["ptx"].count("e4m3x2") * 2 * 32 * kernel.metadata.num_warps,
    }


def int64(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def gates() -> None:
    v2 = Routing(6, normalise=False, scale=16.0, num_groups=8, top_groups=3, group_quality="best")
    for num_experts, routing in ((128, Routing(8)), (256, Routing(8, "sigmoid", True, 2.5, 8, 4)), (160, v2)):
        bias = torch.zeros(num_experts) if routing.scoring == "sigmoid" else None
        counts = GateCounts(torch.zeros(1, dtype=torch.int32), int64(num_experts))
        triton_gate.choose(torch.zeros(4, num_experts), bias, routing, counts)
    triton_gate.choose(torch.zeros(4, 128), torch.zeros(128), Routing(4, logit_bias=True))


def groupings() -> None:
    for num_pairs, num_slots in ((512, 128), (32768, 256)):
        grouping = triton_grouping.group_pairs(int64(num_pairs), int64(num_slots), 64)
    x_PD = triton_grouping.permute(torch.zeros(8, 7168, dtype=BF16), int64(32768), grouping)
    triton_grouping.unpermute(x_PD, grouping, 32768)


def experts() -> None:
    for num_slots, hidden, width in ((128, 2048, 768), (32, 7168, 2048)):
        w13, w2 = (
            torch.empty(num_slots, 2 * width, hidden, dtype=BF16),
            torch.empty(num_slots, hidden, width, dtype=BF16),
        )
        for num_pairs in (8, 40 * num_slots, 100 * num_slots):
            x = torch.empty(num_pairs, hidden, dtype=BF16)
            pairs = int64(num_pairs), int64(num_pairs)
            triton_experts.experts_with(tiles())(x, *pairs, w13, w2, int64(num_slots))
        form = biased(num_slots, hidden, width)
        triton_experts.experts_with(tiles())(x, *pairs, w13, w2, int64(num_slots), form)
        triton_experts.weighted_sum(torch.empty(4, 8, hidden, dtype=BF16), torch.empty(4, 8))


def fp8() -> None:
    for num_slots, hidden, width in ((128, 2048, 768), (32, 7168, 2048)):
        w13 = Quantised(
            eight_bits(num_slots, 2 * width, hidden), torch.empty(num_slots, 2, width // 128, hidden // 128)
        )
        w2 = Quantised(
            eight_bits(num_slots, hidden, width), torch.empty(num_slots, hidden // 128, width // 128)
        )
        for num_pairs in (8, 40 * num_slots):
            pairs = (int64(num_pairs), int64(num_pairs))
            x = Quantised(eight_bits(num_pairs, hidden), torch.empty(num_pairs, hidden // 128))
            triton_experts_fp8.experts_fp8(x, pairs, w13, w2, int64(num_slots), BF16, tiles())
        x_bf16, weight = torch.empty(64, hidden, dtype=BF16), torch.empty(hidden, dtype=BF16)
        triton_fp8.quantise_rows(x_bf16)
        triton_fp8.add_rms_norm_fp8(x_bf16, x_bf16, weight, 1e-6)
        triton_fp8.norm_rows(x_bf16, x_bf16, weight, 1e-6)
        triton_fp8.silu_mul_fp8(x_bf16)
        w, scales = eight_bits(width, hidden), torch.empty(width // 128, hidden // 128)
        for rows, bias in ((1, None), (64, None), (4096, None), (64, torch.empty(width, dtype=BF16))):
            x_rows = torch.empty(rows, hidden, dtype=BF16)
            triton_linear_fp8.linear_fp8(x_rows, w, bias, scales, tiles=tiles())


def four_bit() -> None:
    hidden, width, num_slots = 2048, 768, 8
    for format in (INT4, MXFP4, NVFP4):
        w13, w2 = (
            in_four_bits(num_slots, 2 * width, hidden, format),
            in_four_bits(num_slots, hidden, width, format),
        )
        for num_pairs in (8, 40 * num_slots, 200 * num_slots):
            x = torch.empty(num_pairs, hidden, dtype=BF16)
            pairs = int64(num_pairs), int64(num_pairs)
            triton_experts_four_bit.experts_four_bit_with(tiles())(x, *pairs, w13, w2, int64(num_slots))
    hidden = width = 2880  # gpt-oss
    w13, w2 = (
        in_four_bits(num_slots, 2 * width, hidden, MXFP4),
        in_four_bits(num_slots, hidden, width, MXFP4),
    )
    for num_pairs in (8, 200 * num_slots):
        x = torch.empty(num_pairs, hidden, dtype=BF16)
        pairs, form = (int64(num_pairs), int64(num_pairs)), biased(num_slots, hidden, width)
        triton_experts_four_bit.experts_four_bit_with(tiles())(x, *pairs, w13, w2, int64(num_slots), form)


def biased(num_slots: int, hidden: int, width: int) -> ExpertForm:
    """The form of gpt-oss's experts."""
    biases = torch.empty(num_slots, 2 * width, dtype=BF16), torch.empty(num_slots, hidden, dtype=BF16)
    return ExpertForm(Activation("clamped", 1.702, 7.0), biases)


def in_four_bits(num_slots: int, rows: int, columns: int, format: FourBitFormat) -> FourBit:
    scales = torch.empty(num_slots, rows, format.groups(columns), dtype=SCALE_DTYPES[format.scale])
    factors = torch.empty(num_slots, 2) if format.has_factor else None
    return FourBit(format, torch.empty(num_slots, rows, columns // 2, dtype=torch.uint8), scales, factors)


def eight_bits(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float8_e4m3fn)


def norms() -> None:
    for dim in (128, 512, 2048, 7168):
        x, weight = torch.empty(64, dim, dtype=BF16), torch.empty(dim, dtype=BF16)
        triton_norm.rms_norm(x, weight, 1e-6)
        triton_norm.add_rms_norm(x, x, weight, 1e-6)
        triton_norm.silu_mul(x)


def rotations() -> None:
    for num_heads, kv_heads, dim, turned in ((32, 4, 128, 128), (96, 8, 128, 64), (128, 1, 64, 64)):
        rotation = Angles(torch.empty(8, 1, turned // 2), torch.empty(8, 1, turned // 2))
        q, k = torch.empty(8, num_heads, dim, dtype=BF16), torch.empty(8, kv_heads, dim, dtype=BF16)
        if kv_heads > 1:
            for cache in (
                torch.empty(640, kv_heads, dim, dtype=BF16),
                entries(head_entry("fp8", kv_heads, dim)),
            ):
                triton_rope.rotate_and_write(q, k, k, rotation, (cache, cache), int64(8), False)
        else:
            c = torch.empty(8, 512, dtype=BF16)
            for cache in (torch.empty(640, 576, dtype=BF16), entries(latent_entry("fp8", 512, 64))):
                triton_rope.rotate_and_write_latent(q, c, k[:, 0], rotation, cache, int64(8), True)


def indexers() -> None:
    rotation, norm = Angles(torch.empty(1032, 1, 32), torch.empty(1032, 1, 32)), torch.empty(128, dtype=BF16)
    q, k = torch.empty(1032, 64, 128, dtype=BF16), torch.empty(1032, 128, dtype=BF16)
    for cache in (torch.empty(640, 1, 128, dtype=BF16), entries(index_entry("fp8", 128))):
        key_norm = IndexNorm(norm, norm, 1e-6)
        triton_indexer.rotate_and_write_index(q, k, key_norm, rotation, cache, int64(1032))
        triton_indexer.select_positions(q, torch.empty(1032, 64), cache, paged_batch(), 2048)


def entries(shape: tuple[int, ...]) -> Tensor:
    """A cache in FP8."""
    return torch.empty(640, *shape, dtype=torch.uint8)


def paged_batch() -> PagedBatch:
    starts = torch.zeros(13, dtype=torch.int32)
    return PagedBatch(
        8, 64, starts, starts[:12], torch.zeros(12, 512, dtype=torch.int32), int64(1032), (), ()
    )


def attentions() -> None:
    q = torch.empty(1032, 32, 128, dtype=BF16)
    for splits in (1, 8):
        for cache in (torch.empty(640, 4, 128, dtype=BF16), entries(head_entry("fp8", 4, 128))):
            triton_attention.PagedAttend(in_splits(splits))(q, cache, cache, paged_batch(), 1.0)
    rule = AttentionRule(128, torch.empty(64))
    q, cache = torch.empty(1032, 64, 64, dtype=BF16), torch.empty(640, 8, 64, dtype=BF16)
    for splits in (1, 2):
        triton_attention.PagedAttend(in_splits(splits))(q, cache, cache, paged_batch(), 1.0, rule)


def latent_attentions() -> None:
    attend_latents(torch.empty(640, 576, dtype=BF16))


def latent_attentions_fp8() -> None:
    attend_latents(entries(latent_entry("fp8", 512, 64)))


def attend_latents(cache: Tensor) -> None:
    """DeepSeek-V3's heads, and half of them, as each of two ranks of a tensor group has."""
    for heads, splits in ((128, 1), (128, 8), (64, 8)):
        expand, q = torch.empty(heads, 256, 512, dtype=BF16), torch.empty(1032, heads, 192, dtype=BF16)
        attend = triton_mla.LatentAttend(in_splits(splits))
        attend(q[..., :128], q[..., 128:], cache, expand, paged_batch(), 1.0)


def in_splits(splits: int) -> Tiles:
    names = ("decode", "decode_fp8", "latent_decode", "latent_decode_fp8")
    fitting = tiles()
    return replace(fitting, **{name: replace(getattr(fitting, name), splits=splits) for name in names})


def tiles() -> Tiles:
    """Those of the kind of card that is compiled for."""
    return default_tiles(int(sys.argv[1]))


def pages() -> None:
    triton_pages.copy_pages([torch.empty(640, 576, dtype=BF16)], int64(4), int64(4), 64)


def clocks() -> None:
    """One kernel for all places and both signs."""
    for place, sign in ((0, -1), (1, 1), (16, 1)):
        triton_clock.add_time(int64(32), place, sign)


def samplers() -> None:
    logits, ones = torch.empty(8, 151936), torch.ones(8)
    triton_draw.sample_slots(
        logits, SlotSampling(ones, int64(8), ones, ones, int64(8), int64(8)), Purpose.SAMPLE
    )
    triton_draw.sample(
        logits,
        SamplingParams(
            np.ones(8, np.float32), np.ones(8, np.int64), np.ones(8, np.float32), np.ones(8, np.float32)
        ),
        np.zeros(8),
    )
    triton_sampling.logprobs(logits[:, :1000], int64(8), 1)
    triton_sampling.edit_bias(logits, int64(64), int64(64), torch.ones(64))
    triton_sampling.edit_allowed(logits, int64(8), torch.zeros(8, 4748, dtype=torch.int32))
    triton_sampling.edit_mask(logits, int64(64), int64(64))
    triton_sampling.edit_penalties(logits, (int64(64), int64(64), int64(64)), (ones, ones, ones))


_CASES = (
    gates,
    groupings,
    experts,
    fp8,
    four_bit,
    norms,
    rotations,
    indexers,
    attentions,
    latent_attentions,
    latent_attentions_fp8,
    pages,
    clocks,
    samplers,
)
CASES: dict[str, Callable[[], None]] = {case.__name__: case for case in _CASES}

if __name__ == "__main__":
    main()
