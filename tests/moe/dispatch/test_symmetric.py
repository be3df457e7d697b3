"""Exchanges with counts on the device: EP=N equals EP=1 over doubles of symmetric memory and of
FlashInfer, padding goes nowhere, and nothing is read by the host at the sizes of real models.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore

from lockstep.kernels.reference.experts import weighted_sum
from lockstep.kernels.reference.fp8 import Quantised, quantise_rows
from lockstep.kernels.reference.sublayers import LocalExperts, Residual
from lockstep.moe.balance.placement import Placement, contiguous
from lockstep.moe.dispatch import symmetric
from lockstep.moe.dispatch.dispatcher import Received, RoutedExperts
from lockstep.moe.dispatch.exchange import Handle
from lockstep.moe.dispatch.symmetric import SymmetricExchange
from lockstep.moe.dispatch.within_capacity import TokenShape
from lockstep.parallel.collectives import Collectives
from lockstep.parallel.microbatches import Turns
from lockstep.parallel.rank_groups import RankGroups
from lockstep.parallel.recovery import ProcessSpent
from lockstep.parallel.symmetric_memory import SymmetricGroup, row_alignment
from support.moe.dispatchers import dispatcher_within_capacity
from support.moe.exchange import LAYERS, Case, Kind, run_case
from support.parallel.gloo_ranks import run_ranks
from support.parallel.symmetric_double import AbsentLibrary, SymmetricDouble

CPU = torch.device("cpu")
ALONE = Collectives("alone", 0, 1, None, 1.0, CPU)
KINDS: tuple[Kind, ...] = ("symmetric", "flashinfer", "summing")  # as on GPUs: sums travel back


def _cases(world: int) -> list[Case]:
    spread = (3, 0, 5, 1)[:world]
    return [
        Case("spread, one rank without tokens", 8, 2, spread, 5),
        Case("fewer slots than choices", 8, 6, spread, 5),
        Case("uneven experts", 7, 3, spread, 6),
        Case("fewer experts than ranks", 3, 2, spread, 5),
        Case("one expert takes all", 8, 1, spread, 5, only=6),
        Case("no tokens anywhere", 8, 2, (0,) * world, 4),
        Case("as many tokens as may be", 8, 2, (5, 5, 5, 5)[:world], 5),
        Case("bf16", 8, 4, spread, 5, dtype=torch.bfloat16),
    ]


def _all(collectives: Collectives, cases: list[Case]) -> list[tuple[list[Tensor], Tensor]]:
    return [run_case(case, kind, collectives) for case in cases for kind in KINDS]


@pytest.mark.parametrize("world", [2, 4])
def test_expert_parallel_equals_one_rank(world: int) -> None:
    cases = _cases(world)
    by_rank = run_ranks(_all, world, cases)
    for results in by_rank:
        for outputs, linked in zip(results[::3], results[1::3], strict=True):
            same = [torch.equal(*layers) for layers in zip(outputs[0], linked[0], strict=True)]
            assert all(same) or world > 3, "sums of up to three ranks have one order"
    for number, (case, kind) in enumerate((case, kind) for case in cases for kind in KINDS):
        expected, expected_counts = run_case(case, "local", ALONE)
        placement = contiguous(LAYERS, case.num_experts, world)
        for layer in range(LAYERS):
            joined = torch.cat([by_rank[rank][number][0][layer] for rank in range(world)])
            limit = 2e-6 if case.dtype == torch.float32 else 2e-2
            wrong = (joined - expected[layer]).abs() > limit * (1 + expected[layer].abs())
            assert not wrong.any(), f"{case.name}, {kind}, layer {layer}: outputs differ"
            counts = torch.zeros(case.num_experts, dtype=torch.int64)
            for rank in range(world):
                for slot, expert in enumerate(placement.experts_of(rank, layer)):
                    if expert >= 0:
                        counts[expert] += by_rank[rank][number][1][layer, slot]
                    else:
                        assert by_rank[rank][number][1][layer, slot] == 0
            assert torch.equal(counts, expected_counts[layer]), (
                f"{case.name}, {kind}, layer {layer}: counts differ"
            )


def test_padded_rows_go_nowhere_and_stale_rows_are_no_pairs() -> None:
    """A full step leaves rows behind; in the next one half of the rows are padding."""
    exchange = _exchange(
        SymmetricDouble(ALONE), contiguous(1, 4, 1), TokenShape((6,), 2, 8, torch.float32), CPU
    )
    x, ids, weights = torch.randn(6, 8), torch.tensor([[0, 3]] * 6), torch.rand(6, 2)
    exchange.begin_step(6, 6)
    full = exchange.dispatch(x, ids, weights, 0)
    first = exchange.receive(full)
    assert (first.slots_M >= 0).all() and len(first.slots_M) == 12
    exchange.send_back(first.x_ND[first.rows_M], full)
    exchange.combine(full)
    ids[3:] = -1
    handle = exchange.dispatch(x, ids, weights, 0)
    received = exchange.receive(handle)
    assert (received.slots_M >= 0).sum() == 6 and (received.slots_M.view(6, 2)[3:] == -1).all()
    y = torch.where((received.slots_M >= 0)[:, None], received.x_ND[received.rows_M], 0)
    exchange.send_back(y, handle)
    combined = exchange.combine(handle)
    torch.testing.assert_close(combined[:3], x[:3] * weights[:3].sum(1, keepdim=True))
    assert not combined[3:].any(), "padding gets zeros"


@pytest.mark.parametrize("kind", ["symmetric", "flashinfer", "deepep", "nccl_ep"])
@pytest.mark.parametrize("most", [6, 8])
def test_two_microbatches_are_under_way_at_once(kind: str, most: int) -> None:
    """Layer after layer, in regions of their own or in one memory; then a step of full capacity
    finds it free.
    """
    turns, shape = Turns(), TokenShape((8, most), 2, 8, torch.float32)
    dispatcher = dispatcher_within_capacity(kind, contiguous(3, 4, 1), ALONE, shape, turns)
    inputs = [(torch.randn(count, 8), torch.rand(count, 2)) for count in (6, 4, 8)]

    def forward(x: Tensor, weights: Tensor) -> list[Tensor]:
        ids = torch.arange(2 * len(x)).view(-1, 2) % 4
        routed = RoutedExperts(2, lambda residual: (residual[0], residual[0], ids, weights), _scaled, _never)
        return [
            dispatcher.run(layer, routed, (x + layer, None), lambda normed: None)[1] for layer in range(3)
        ]

    def expected(x: Tensor, weights: Tensor) -> list[Tensor]:
        slots = torch.arange(2 * len(x)).view(-1, 2) % 4
        return [(x + layer) * (weights * (1 + slots)).sum(1, keepdim=True) for layer in range(3)]

    dispatcher.begin_step(6, 6)
    first, second, whole = inputs
    found = turns.run(lambda: forward(*first), lambda: forward(*second))
    torch.testing.assert_close(list(found), [expected(*first), expected(*second)])
    dispatcher.begin_step(8, 8)
    torch.testing.assert_close(forward(*whole), expected(*whole))


def test_memory_is_built_once_in_a_process() -> None:
    group = SymmetricGroup("experts", 0, 1, HashStore(), CPU, SymmetricDouble(ALONE))
    region = group.reserve((3,), torch.int64)
    group.build(1)
    assert group[region].tolist() == [0, 0, 0]
    groups = RankGroups(Collectives("experts of stage 0", 0, 2, HashStore(), 1.0, CPU), group)
    assert groups.recovery == "process restart", "the gravest: survivors do not go on without a rank"
    with pytest.raises(ProcessSpent, match="experts: the epoch has ended"):
        group.destroy()
    with pytest.raises(ProcessSpent, match="experts: epoch 2"):
        group.build(2)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6, 7, 8, 12, 16, 24, 32, 64, 72, 320])
def test_rows_divide_among_the_blocks_of_a_peer(size: int) -> None:
    for most in (64, 16):
        assert row_alignment(size) % (16 * max(1, most // size)) == 0


QWEN3 = (TokenShape((1024,), 8, 2048, torch.bfloat16), 128, 48)
DEEPSEEK = (TokenShape((1024,), 8, 7168, torch.bfloat16), 256, 58)
IN_FP8 = (replace(DEEPSEEK[0], eight=True), *DEEPSEEK[1:])


@pytest.mark.parametrize(
    ("model", "ranks", "rows"),
    [(QWEN3, 8, 128), (QWEN3, 72, 64), (DEEPSEEK, 72, 1024), (DEEPSEEK, 72, 0), (IN_FP8, 72, 1024)],
)
def test_no_value_reaches_the_host(
    model: tuple[TokenShape, int, int], ranks: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of the device "meta" have no values: whatever the host reads, sizes by data or mixes
    with its own tensors raises.
    """
    shape, num_experts, num_layers = model
    monkeypatch.setattr(symmetric, "ops_of", lambda column: _TorchSum())
    placement, library, device = (
        contiguous(num_layers, num_experts, ranks),
        AbsentLibrary(),
        torch.device("meta"),
    )
    exchange = _exchange(library, placement, shape, device)
    exchange.begin_step(rows, shape.capacities[0])
    x = torch.empty(rows, shape.hidden, dtype=shape.dtype, device=device)
    ids = torch.empty(rows, shape.top_k, dtype=torch.int64, device=device)
    handle = exchange.dispatch(x, ids, torch.empty(rows, shape.top_k, device=device), num_layers - 1)
    received = exchange.receive(handle)
    pairs = min(shape.top_k, placement.num_slots)
    tokens, item = received.x_ND, shape.dtype.itemsize
    if isinstance(tokens, Quantised):
        assert tokens.scales.shape == (ranks * shape.capacities[0], shape.hidden // 128)
        tokens, item = tokens.values, 1
    assert tokens.shape == (ranks * shape.capacities[0], shape.hidden)
    assert tokens.stride(1) == 1 and tokens.stride(0) * item % 16 == 0
    assert received.slots_M.shape == received.rows_M.shape == (ranks * shape.capacities[0] * pairs,)
    assert received.slots_M.dtype == received.rows_M.dtype == torch.int64
    y = torch.empty(len(received.rows_M), shape.hidden, dtype=shape.dtype, device=device)
    exchange.send_back(y, handle)
    combined = exchange.combine(handle)
    assert combined.shape == x.shape and combined.dtype == x.dtype and combined.device == device
    assert library.calls == 2, "one exchange each way"


def test_the_token_sent_twice_is_sent_once() -> None:
    """A row for each rank that has one of the token's experts, whatever their number."""
    counted: list[list[int]] = []

    class Counting(AbsentLibrary):
        def all_to_all_vdev(
            self, rows: Tensor, received: Tensor, splits_W: Tensor, received_2W: Tensor, group: str
        ) -> None:
            counted.append(splits_W.tolist())

    exchange = _exchange(Counting(), contiguous(1, 8, 4), TokenShape((4,), 3, 8, torch.float32), CPU)
    exchange.begin_step(3, 4)
    ids = torch.tensor([[0, 1, 7], [2, 3, 6], [-1, -1, -1]])  # two experts a rank
    handle = exchange.dispatch(torch.randn(3, 8), ids, torch.rand(3, 3), 0)
    assert counted == [[1, 1, 0, 2]]
    assert isinstance(handle, Handle)
    rows = len(exchange._group[exchange._lanes[0].there.sent])
    assert handle.state.sent_TK.tolist() == [[0, rows - 1, 2], [1, rows - 1, 3], [rows - 1] * 3]


def test_a_rank_rehearses_over_memory_of_its_own() -> None:
    """Tokens go nowhere and none come, in the shapes of an exchange; then the ranks meet."""
    library, shape = AbsentLibrary(), TokenShape((4,), 3, 8, torch.float32)
    exchange = _exchange(library, contiguous(1, 8, 4), shape, CPU, build=False)
    group = exchange._group
    group.rehearse()
    for _ in range(2):
        exchange.begin_step(3, 4)
        handle = exchange.dispatch(torch.randn(3, 8), torch.arange(9).view(3, 3) % 8, torch.rand(3, 3), 0)
        received = exchange.receive(handle)
        assert received.x_ND.shape == (16, 8) and (received.slots_M == -1).all()
        exchange.send_back(torch.zeros(len(received.rows_M), 8), handle)
        assert exchange.combine(handle).shape == (3, 8)
    assert library.calls == 0
    group.destroy()
    group.build(0)
    with pytest.raises(ProcessSpent):
        group.destroy()


def test_more_tokens_than_memory_is_our_bug() -> None:
    exchange = _exchange(AbsentLibrary(), contiguous(1, 8, 4), TokenShape((4,), 3, 8, torch.float32), CPU)
    with pytest.raises(AssertionError, match="3 tokens, capacity 5, at most 4"):
        exchange.begin_step(3, 5)


def _scaled(received: Received, counts_S: Tensor) -> Tensor:
    """Outputs of experts: a token times the number of its slot, from 1."""
    return received.x_ND[received.rows_M] * (1 + received.slots_M)[:, None]


def _never(residual: Residual, local: LocalExperts) -> tuple[Tensor, Tensor, Tensor]:
    raise AssertionError("experts are reached by an exchange")


class _TorchSum:
    """The op of the exchange, in plain torch: fake tensors reach no Triton kernel."""

    weighted_sum = staticmethod(weighted_sum)
    quantise_rows = staticmethod(quantise_rows)


def _exchange(
    library: SymmetricDouble | AbsentLibrary,
    placement: Placement,
    shape: TokenShape,
    device: torch.device,
    build: bool = True,
) -> SymmetricExchange:
    group = SymmetricGroup("experts", 0, placement.num_ranks, HashStore(), device, library)
    exchange = SymmetricExchange(placement, group, device, replace(shape))
    if build:
        group.build(1)
    return exchange
