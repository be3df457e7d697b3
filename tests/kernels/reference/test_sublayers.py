"""Sublayers in one call against the ops they consist of: equal to the bit, and close to the
reference.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lockstep.kernels import cpu_isa
from lockstep.kernels.activation import Activation
from lockstep.kernels.cpu.column import Cpu
from lockstep.kernels.formats.kv_format import head_entry
from lockstep.kernels.reference.attention import AttentionRule
from lockstep.kernels.reference.column import Reference
from lockstep.kernels.reference.experts import ExpertForm
from lockstep.kernels.reference.gate import Routing
from lockstep.kernels.reference.paged import PagedBatch, build_batch
from lockstep.kernels.reference.rope import HeadNorms, angles, frequencies
from lockstep.kernels.reference.sublayers import (
    GateWeights,
    GroupedHeads,
    LocalExperts,
    Projection,
    Residual,
    RowNorm,
)
from lockstep.kernels.table import ops_of
from support.grids import pairwise

HIDDEN, HEADS, KEYS, DIM, SLOTS, WIDTH, TOP_K = 64, 4, 2, 32, 8, 48, 3
CPU, REFERENCE = ops_of("cpu"), ops_of("reference")
# Few rows stay on one thread; from 600 rows on every pass is shared among threads.
ROWS = [(1, 0), (7, 0), (0, 600), (5, 33)]  # decode rows, tokens of an extend


def _draw(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()


def _residual(num_tokens: int, first: bool) -> Residual:
    return _draw(num_tokens, HIDDEN, seed=1), None if first else _draw(num_tokens, HIDDEN, seed=2)


def _batch(num_decode: int, extend: int) -> tuple[PagedBatch, Tensor]:
    starts, counts = np.full(num_decode + bool(extend), 40), np.ones(num_decode + bool(extend), np.int64)
    if extend:
        counts[-1] = extend
    pages = np.arange(len(starts) * 48, dtype=np.int32).reshape(len(starts), 48)
    return build_batch(starts, counts, num_decode, pages, 16)


def _attention(
    ops: Reference, column: type[Reference], rows: tuple[int, int], given: dict[str, bool]
) -> list[Tensor]:
    """The residual and the cache after the sublayer, as class ``column`` makes it of the ops."""
    qkv = _draw((HEADS + 2 * KEYS) * DIM, HIDDEN, scale=0.1, seed=3)
    out = _draw(HIDDEN, HEADS * DIM, scale=0.1, seed=4)
    biases = (_draw(len(qkv), seed=5), _draw(HIDDEN, seed=6)) if given["bias"] else (None, None)
    head_norms = HeadNorms(_draw(DIM, seed=7), _draw(DIM, seed=8), 1e-6) if given["norms"] else None
    projections = Projection(ops.pack(qkv), biases[0]), Projection(ops.pack(out), biases[1])
    batch, positions = _batch(*rows)
    entry = head_entry("fp8" if given["fp8"] else "bf16", KEYS, DIM)
    dtype = torch.uint8 if given["fp8"] else torch.bfloat16
    cache = (torch.zeros(4096 * 2, *entry, dtype=dtype), torch.zeros(4096 * 2, *entry, dtype=dtype))
    norm = RowNorm(_draw(HIDDEN, seed=9), 1e-6)
    rule = AttentionRule(20, torch.linspace(-1, 1, HEADS)) if given["rule"] else AttentionRule()
    sublayer = column.attention_sublayer(ops, norm, GroupedHeads(DIM, False, head_norms, *projections, rule))
    residual = _residual(sum(rows), given["first"])
    return [*sublayer(residual, angles(positions, frequencies(DIM, 1e4)), batch, cache), *cache]


def _experts(
    ops: Reference, column: type[Reference], num_tokens: int, first: bool, bias: bool
) -> list[Tensor]:
    """Sum, norm, outputs and counts, as the sublayer of class ``column`` makes them of the ops."""
    w13 = _draw(SLOTS, 2 * WIDTH, HIDDEN, scale=0.1, seed=3)
    w2 = _draw(SLOTS, HIDDEN, WIDTH, scale=0.1, seed=4)
    routing = Routing(TOP_K, "sigmoid", num_groups=4, top_groups=2, scale=2.5) if bias else Routing(TOP_K)
    gate_bias = _draw(SLOTS, seed=6).float() if bias else None
    gate = GateWeights(_draw(SLOTS, HIDDEN, seed=5).float(), gate_bias, routing)
    rows_M = torch.arange(num_tokens).repeat_interleave(TOP_K)
    counts_S = torch.zeros(SLOTS, dtype=torch.int64)
    local = LocalExperts(torch.arange(SLOTS).flip(0), rows_M, counts_S)
    norm = RowNorm(_draw(HIDDEN, seed=9), 1e-6)
    form = ExpertForm()
    if bias:
        biases = _draw(SLOTS, 2 * WIDTH, seed=10), _draw(SLOTS, HIDDEN, seed=11)
        form = ExpertForm(Activation("clamped", 1.7, 1.0), biases)
    sublayer = column.experts_sublayer(ops, norm, gate, ops.pack_slots(w13, w2), form)
    return [*sublayer(_residual(num_tokens, first), local), counts_S]


@pairwise(
    {
        "rows": ROWS,
        "bias, norms, fp8": [(False, True, False), (True, False, False), (False, True, True)],
        "first": [False, True],
        "rule": [False, True],
    }
)
def test_attention_in_one_call(
    rows: tuple[int, int], first: bool, rule: bool, bias: bool, norms: bool, fp8: bool
) -> None:
    given = {"first": first, "bias": bias, "norms": norms, "fp8": fp8, "rule": rule}
    got = _attention(CPU, Cpu, rows, given)
    for one, other in zip(got, _attention(CPU, Reference, rows, given), strict=True):
        assert torch.equal(one, other)
    expected = _attention(REFERENCE, Reference, rows, given)
    for one, other in zip(got[:2], expected[:2], strict=True):
        torch.testing.assert_close(one, other, rtol=3e-2, atol=3e-2)


@pairwise({"num_tokens": [0, 1, 7, 600], "first": [False, True], "bias": [False, True]})
def test_experts_in_one_call(num_tokens: int, first: bool, bias: bool) -> None:
    got = _experts(CPU, Cpu, num_tokens, first, bias)
    for one, other in zip(got, _experts(CPU, Reference, num_tokens, first, bias), strict=True):
        assert torch.equal(one, other)
    assert int(got[-1].sum()) == TOP_K * num_tokens
    if num_tokens in (1, 7):  # with more tokens, rounding decides between equal choices somewhere
        expected = _experts(REFERENCE, Reference, num_tokens, first, bias)
        for one, other in zip(got[:3], expected[:3], strict=True):
            torch.testing.assert_close(one, other, rtol=3e-2, atol=3e-2)


def test_weights_in_blocks_take_the_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def composed(*_: Any) -> None:
        raise AssertionError("made of single ops")

    monkeypatch.setattr(cpu_isa, "here", lambda: "avx512_bf16")  # holds weights in blocks
    monkeypatch.setattr(Reference, "attention_sublayer", lambda *_: composed)
    monkeypatch.setattr(Reference, "experts_sublayer", lambda *_: composed)
    _attention(CPU, Cpu, (2, 0), {"first": False, "bias": False, "norms": True, "fp8": False, "rule": True})
    _experts(CPU, Cpu, 2, first=False, bias=False)
