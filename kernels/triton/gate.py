"""Triton column of ``gate``: the routing rule in one pass over the logits.

The library computes the product with the gate's weights: it is float32, E is small, and a small
batch needs it split over the hidden dim. Roofline of the kernel: memory, T x (4 E read + 12 K
written) bytes; in practice the latency of 3 K reductions over E.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..reference.gate import Routing
from .target import interpreted, power_of_two


def gate(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
    """Same as ``gate.gate``. Ties go to the lower expert."""
    return choose(_logits(x_TD, weight_ED), bias_E, routing)


def _logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """Logits [T, E] float32. Products of numbers in 16 bits are exact in float32, so those of
    narrow weights differ from those of the widened ones in the order of sums alone.
    """
    if weight_ED.dtype == torch.float32:
        return F.linear(x_TD.float(), weight_ED)
    if interpreted():  # a CPU's products have the dtype of their factors
        return F.linear(x_TD.float(), weight_ED.float())
    assert x_TD.dtype == weight_ED.dtype, f"x in {x_TD.dtype}, the gate's weights in {weight_ED.dtype}"
    return torch.mm(x_TD, weight_ED.t(), out_dtype=torch.float32)


def choose(logits_TE: Tensor, bias_E: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
    """Same as ``gate.choose``."""
    num_tokens, num_experts = logits_TE.shape
    assert num_experts % routing.num_groups == 0, f"{num_experts} experts in {routing.num_groups} groups"
    assert logits_TE.dtype == torch.float32 and logits_TE.stride(1) == 1
    ids_TK = torch.empty(num_tokens, routing.top_k, dtype=torch.int64, device=logits_TE.device)
    weights_TK = torch.empty(num_tokens, routing.top_k, dtype=torch.float32, device=logits_TE.device)
    if num_tokens:
        _choose_kernel[(num_tokens,)](
            logits_TE,
            logits_TE.stride(0),
            bias_E if bias_E is not None else logits_TE,
            ids_TK,
            weights_TK,
            routing.scale,
            E=num_experts,
            E_PAD=power_of_two(num_experts),
            G=routing.num_groups,
            G_PAD=power_of_two(routing.num_groups),
            TOP_G=routing.top_groups,
            TWO=routing.group_quality == "best_two",
            K=routing.top_k,
            K_PAD=power_of_two(routing.top_k),
            SIGMOID=routing.scoring == "sigmoid",
            NORMALISE=routing.normalise,
            BIAS=bias_E is not None,
            LOGIT_BIAS=bias_E is not None and routing.logit_bias,
            num_warps=1 if num_experts <= 128 else 2,
        )
    return ids_TK, weights_TK


@triton.jit
def _choose_kernel(
    logits_ptr,
    logits_stride,
    bias_ptr,
    ids_ptr,
    weights_ptr,
    scale,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    G: tl.constexpr,
    G_PAD: tl.constexpr,
    TOP_G: tl.constexpr,
    TWO: tl.constexpr,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALISE: tl.constexpr,
    BIAS: tl.constexpr,
    LOGIT_BIAS: tl.constexpr,
):
    """One token per program."""
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, E_PAD)
    inside = expert < E
    never = float("-inf")
    logits = tl.load(logits_ptr + token * logits_stride + expert, mask=inside, other=0.0)
    if LOGIT_BIAS:
        logits += tl.load(bias_ptr + expert, mask=inside, other=0.0)
    logits = tl.where(inside, logits, never)
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    else:
        scores = tl.exp(logits - tl.max(logits, 0))
        scores = scores / tl.sum(scores, 0)
    choice = scores
    if BIAS and not LOGIT_BIAS:
        choice = scores + tl.load(bias_ptr + expert, mask=inside, other=0.0)
    choice = tl.where(inside, choice, never)

    if TOP_G < G:
        group_of = expert // (E // G)
        group = tl.arange(0, G_PAD)
        quality = tl.full((G_PAD,), never, tl.float32)
        for g in tl.static_range(G):
            members = tl.where(group_of == g, choice, never)
            best = tl.argmax(members, 0)
            good = tl.max(members, 0)
            if TWO and E // G > 1:
                good += tl.max(tl.where(expert == best, never, members), 0)
            quality = tl.where(group == g, good, quality)
        eligible = expert < 0
        for _ in tl.static_range(TOP_G):
            best_group = tl.argmax(quality, 0)
            eligible = eligible | (group_of == best_group)
            quality = tl.where(group == best_group, never, quality)
        choice = tl.where(eligible, choice, never)

    k = tl.arange(0, K_PAD)
    ids = tl.full((K_PAD,), -1, tl.int32)
    weights = tl.zeros((K_PAD,), tl.float32)
    for i in tl.static_range(K):
        best = tl.argmax(choice, 0)
        ids = tl.where(k == i, best, ids)
        weights = tl.where(k == i, tl.sum(tl.where(expert == best, scores, 0.0), 0), weights)
        choice = tl.where(expert == best, never, choice)
    if NORMALISE:
        weights = weights / tl.maximum(tl.sum(weights, 0), 1e-20)
    weights = weights * scale

    tl.store(ids_ptr + token * K + k, ids.to(tl.int64), mask=k < K)
    tl.store(weights_ptr + token * K + k, weights, mask=k < K)
