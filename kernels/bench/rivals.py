"""Other libraries' implementations of the same work: torch's grouped products, its attention on
gathered pages, vLLM's experts.

A rival prepares on its first call, which is not timed; there it raises ImportError if its library
is missing.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference.column import Reference
from ..table import ops_of, with_libraries

Run = Callable[[], object]


def grouped_mm(x_MD: Tensor, slots_M: Tensor, weights: tuple[Tensor, Tensor]) -> Run:
    """``torch._grouped_mm``, with rows gathered and scattered around it. The routing is known
    beforehand.
    """
    w13_SFD, w2_SDF = weights
    sorted_by = _sorted_by_slot(slots_M, len(w13_SFD))

    def run() -> Tensor:
        order, ends = sorted_by()
        gate, up = torch._grouped_mm(x_MD[order], w13_SFD.transpose(1, 2), offs=ends).chunk(2, -1)
        y_MD = torch._grouped_mm(F.silu(gate) * up, w2_SDF.transpose(1, 2), offs=ends)
        return torch.empty_like(x_MD).index_copy_(0, order, y_MD)

    return run


def scaled_grouped_mm(
    x_MD: Tensor, slots_M: Tensor, weights: tuple[Tensor, Tensor], scales: tuple[float, float, float]
) -> Run:
    """``torch._scaled_grouped_mm``, with a scale per row and per column of weights: less work than
    128 x 128 blocks.
    """
    w13_SFD, w2_SDF = weights
    sorted_by = _sorted_by_slot(slots_M, len(w13_SFD))

    @functools.cache
    def constant_scales() -> tuple[Tensor, ...]:
        sizes = (len(x_MD),), (len(w13_SFD), w13_SFD.shape[1]), (len(w2_SDF), w2_SDF.shape[1])
        return tuple(
            torch.full(size, scale, device=x_MD.device) for size, scale in zip(sizes, scales, strict=True)
        )

    def run() -> Tensor:
        order, ends = sorted_by()
        x_scale, w13_scale, w2_scale = constant_scales()
        gate_up = torch._scaled_grouped_mm(
            x_MD.view(torch.uint8)[order].view(x_MD.dtype),
            w13_SFD.transpose(1, 2),
            x_scale,
            w13_scale,
            offs=ends,
            out_dtype=torch.bfloat16,
        )
        gate, up = gate_up.float().chunk(2, -1)
        h_MF = F.silu(gate) * up
        h_scale = h_MF.abs().amax(-1).div(448.0).clamp_min(1e-12)
        h8_MF = (h_MF / h_scale[:, None]).to(x_MD.dtype)
        y_MD = torch._scaled_grouped_mm(
            h8_MF, w2_SDF.transpose(1, 2), h_scale, w2_scale, offs=ends, out_dtype=torch.bfloat16
        )
        return torch.empty_like(y_MD).index_copy_(0, order, y_MD)

    return run


def vllm_experts(x_MD: Tensor, slots_M: Tensor, weights: tuple[Tensor, Tensor]) -> Run:
    """vLLM's Triton ``fused_experts``, with every pair as a token of one expert with weight 1."""

    @functools.cache
    def prepared() -> tuple[Callable[..., Tensor], Tensor, Tensor]:
        module = importlib.import_module("vllm.model_executor.layers.fused_moe.fused_moe")
        return (
            module.fused_experts,
            torch.ones(len(slots_M), 1, device=x_MD.device),
            slots_M[:, None].to(torch.int32),
        )

    def run() -> Tensor:
        fused_experts, ones, ids = prepared()
        return fused_experts(x_MD, *weights, ones, ids)

    return run


def sdpa(q_RHGD: Tensor, k_RHLD: Tensor, v_RHLD: Tensor, scale: float, causal: bool = False) -> Run:
    """``scaled_dot_product_attention`` on entries gathered from pages beforehand. The heads of a
    group take the place of queries.
    """
    return lambda: F.scaled_dot_product_attention(q_RHGD, k_RHLD, v_RHLD, is_causal=causal, scale=scale)


def by_library(
    bind: Callable[[Reference], Run], device: torch.device, name: str, op: str = "attention"
) -> Run:
    """Our ops with a library's attention, as a recipe with ``kernels: {op: name}`` has them."""

    @functools.cache
    def prepared() -> Run:
        return bind(with_libraries(ops_of("triton"), {op: name}, device))

    return lambda: prepared()()


def convert_e4m3(bits: Tensor) -> Run:
    """torch's own conversion."""
    return lambda: bits.view(torch.float8_e4m3fn).to(torch.bfloat16)


def _sorted_by_slot(slots_M: Tensor, num_slots: int) -> Callable[[], tuple[Tensor, Tensor]]:
    @functools.cache
    def sort() -> tuple[Tensor, Tensor]:
        return slots_M.argsort(stable=True), torch.bincount(slots_M, minlength=num_slots).cumsum(0).to(
            torch.int32
        )

    return sort


def one_by_one(x: Tensor, rows_M: Tensor, slots_M: Tensor, w13: Tensor, w2: Tensor) -> Callable[[], object]:
    """The experts of one slot after the other by oneDNN, its weights packed where it packs them."""
    from ..cpu.experts import experts
    from ..cpu.linear import pack_for_onednn

    up, down = ([pack_for_onednn(slot) for slot in weights] for weights in (w13, w2))
    counts = torch.zeros(len(w13), dtype=torch.int64)
    return lambda: experts(x, rows_M, slots_M, up, down, counts)
