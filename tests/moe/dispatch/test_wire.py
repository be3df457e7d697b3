"""Tokens that travel to experts in FP8: the same bits as those that experts in FP8 quantise."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lockstep.kernels.reference import fp8
from lockstep.kernels.reference.fp8 import Quantised, quantise_blocks, quantise_w13
from lockstep.kernels.reference.sublayers import Residual
from lockstep.moe.balance.placement import contiguous
from lockstep.moe.dispatch.all_gather import AllGatherExchange
from lockstep.moe.dispatch.dispatcher import Received, RoutedExperts
from lockstep.moe.dispatch.exchange import ExchangeDispatcher
from lockstep.moe.dispatch.rows import TokenForm
from lockstep.moe.dispatch.within_capacity import TokenShape
from lockstep.parallel.collectives import Collectives
from support.moe.dispatchers import dispatcher_within_capacity
from support.parallel.gloo_ranks import run_ranks

CPU = torch.device("cpu")
HIDDEN, WIDTH, EXPERTS, TOP_K, CAPACITY = 160, 40, 4, 2, 8
KINDS = ("exact", "summing", "symmetric", "flashinfer", "deepep", "nccl_ep")


def dispatcher(kind: str, collectives: Collectives, eight: bool) -> ExchangeDispatcher:
    placement = contiguous(1, EXPERTS, collectives.size)
    if kind in ("symmetric", "flashinfer", "deepep", "nccl_ep"):
        shape = TokenShape((CAPACITY,), TOP_K, HIDDEN, torch.bfloat16, eight)
        return dispatcher_within_capacity(kind, placement, collectives, shape)
    exchange = AllGatherExchange(placement, collectives, CPU, exact=kind == "exact", eight=eight)
    return ExchangeDispatcher(exchange, CPU)


def outputs(collectives: Collectives) -> list[tuple[Tensor, Tensor, str, int]]:
    """For every kind and wire: the outputs of this rank's tokens, the counts of its experts, the
    type of what they received, and the bytes that were sent.
    """
    rank, generator = collectives.index, torch.Generator().manual_seed(collectives.index)
    x = torch.randn(5 + rank, HIDDEN, generator=generator).to(torch.bfloat16)
    ids = torch.rand(len(x), EXPERTS, generator=generator).topk(TOP_K).indices
    weights = torch.rand(len(x), TOP_K, generator=generator)
    w13 = quantise_w13(stack(2 * WIDTH, HIDDEN, rank, collectives.size))
    w2 = quantise_blocks(stack(HIDDEN, WIDTH, rank, collectives.size))
    found = []
    for kind, eight in itertools.product(KINDS, (False, True)):
        kinds: list[str] = []

        def compute(received: Received, counts_S: Tensor, kinds: list[str] = kinds) -> Tensor:
            kinds.append(type(received.x_ND).__name__)
            tokens = received.x_ND
            rows = tokens if isinstance(tokens, Quantised) else fp8.quantise_rows(tokens)
            pairs = received.rows_M, received.slots_M
            return fp8.experts_fp8(rows, pairs, w13, w2, counts_S, torch.bfloat16)

        def choose(residual: Residual) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            return x, x, ids, weights

        made, sent = dispatcher(kind, collectives, eight), [0]
        collectives.all_gather = counting(collectives, sent)  # type: ignore[method-assign]
        made.begin_step(len(x), CAPACITY)
        routed = RoutedExperts(TOP_K, choose, compute, never)
        y = made.run(0, routed, (x, None), lambda x: None)[1]
        del collectives.all_gather
        found.append((y, made.counts_LS, kinds[0], sent[0]))
    return found


def counting(collectives: Collectives, sent: list[int]) -> Callable[..., object]:
    gather = type(collectives).all_gather

    def count(rows: Tensor, what: str, fill: int = 0) -> object:
        sent[0] += rows.nbytes
        return gather(collectives, rows, what, fill)

    return count


def stack(rows: int, columns: int, rank: int, size: int) -> Tensor:
    """Matrices of the experts of a rank."""
    each = torch.randn(EXPERTS, rows, columns, generator=torch.Generator().manual_seed(9)) / columns**0.5
    share = EXPERTS // size
    return each[rank * share : (rank + 1) * share]


def never(*args: object) -> tuple[Tensor, Tensor, Tensor]:
    raise AssertionError("experts are reached by an exchange")


def test_tokens_in_fp8_give_the_bits_of_experts_that_quantise_them() -> None:
    for by_kind in run_ranks(outputs, 2):
        for kind, (full, eight) in zip(KINDS, zip(by_kind[::2], by_kind[1::2], strict=True), strict=True):
            assert (full[2], eight[2]) == ("Tensor", "Quantised"), kind
            assert full[0].any() and (kind == "deepep" or torch.equal(full[0], eight[0])), kind
            # DeepEP's kernels quantise: they multiply by 448 / amax where experts divide.
            torch.testing.assert_close(full[0], eight[0], rtol=2e-2, atol=2e-2)
            assert torch.equal(full[1], eight[1]), kind
        (_, _, _, wide), (_, _, _, narrow) = by_kind[2:4]
        assert wide == CAPACITY * (2 * HIDDEN + 8 * TOP_K)
        assert narrow == CAPACITY * (HIDDEN + 4 * 2 + 8 * TOP_K), "two groups of values, a scale for each"


@pytest.mark.parametrize("hidden", [32, 130, 256])
def test_a_row_holds_what_it_was_given(hidden: int) -> None:
    x = torch.randn(3, hidden)
    form = TokenForm(hidden, torch.float32, fp8.quantise_rows)
    rows = torch.zeros(3, form.num_bytes + 16, dtype=torch.uint8)
    for part, values in zip(form.parts(rows), form.of(x), strict=True):
        part.copy_(values)
    found, wanted = form.read(rows), fp8.quantise_rows(x)
    assert isinstance(found, Quantised) and torch.equal(found.scales, wanted.scales)
    assert torch.equal(found.values.view(torch.uint8), wanted.values.view(torch.uint8))
    assert not rows[:, form.num_bytes :].any()
