"""Exchanges by slots, by DeepEP and by NCCL EP: bits of all_to_all, padding, and nothing read by
the host.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore

from lockstep.kernels.reference.fp8 import quantise_rows
from lockstep.moe.balance.placement import contiguous
from lockstep.moe.dispatch import slot_major
from lockstep.moe.dispatch.slot_major import SlotMajorExchange
from lockstep.moe.dispatch.within_capacity import TokenShape
from lockstep.parallel.collectives import Collectives
from lockstep.parallel.deepep import DeepEPGroup
from lockstep.parallel.nccl_ep import NcclEpGroup
from lockstep.parallel.slot_major import SlotGroup
from support.moe.exchange import Case, Kind, run_case
from support.moe.rounds_without_memory import exchange_without_memory
from support.parallel.deepep_double import DeepEPDouble
from support.parallel.gloo_ranks import run_ranks
from support.parallel.nccl_ep_double import NcclEpDouble

CPU = torch.device("cpu")
ALONE = Collectives("alone", 0, 1, None, 1.0, CPU)
SHAPE = TokenShape((6, 6), 2, 2048, torch.bfloat16)
GROUPS = {"deepep": "DeepEP over NVSHMEM", "nccl_ep": "NCCL EP"}
KINDS: tuple[Kind, ...] = ("all_to_all", "deepep", "nccl_ep")
Results = list[tuple[list[Tensor], Tensor]]


def _cases(world: int) -> list[Case]:
    spread = (3, 0, 5, 1)[:world]
    return [
        Case("spread, one rank without tokens", 8, 2, spread, 5),
        Case("fewer slots than choices", 8, 6, spread, 5),
        Case("uneven experts", 7, 3, spread, 6),
        Case("one expert takes all", 8, 1, spread, 5, only=6),
        Case("no tokens anywhere", 8, 2, (0,) * world, 4),
        Case("as many tokens as may be", 8, 2, (5, 5, 5, 5)[:world], 5),
        Case("bf16", 8, 4, spread, 5, dtype=torch.bfloat16),
        Case("replicas take turns", 6, 3, spread, 5, dtype=torch.bfloat16, redundant=world),
    ]


def _all(collectives: Collectives, cases: list[Case]) -> list[Results]:
    return [[run_case(case, kind, collectives) for kind in KINDS] for case in cases]


@pytest.mark.parametrize("world", [2, 4])
def test_tokens_have_the_bits_of_all_to_all(world: int) -> None:
    """Outputs come back one by one in all of them, and are summed in the same order."""
    cases = _cases(world)
    for results in run_ranks(_all, world, cases):
        for case, ((plain, plain_counts), *others) in zip(cases, results, strict=True):
            for kind, (linked, counts) in zip(KINDS[1:], others, strict=True):
                assert all(map(torch.equal, plain, linked)), f"{case.name}, {kind}"
                assert torch.equal(plain_counts, counts), f"{case.name}, {kind}"


@pytest.mark.parametrize("library", GROUPS)
def test_padding_and_stale_rows_are_no_pairs(library: str) -> None:
    """Half of the rows of a second round are padding; rows without a token are NaN. One token has
    one expert, and outputs of no pair mean nothing.
    """
    group = _group(library, 1, CPU)
    exchange = SlotMajorExchange(contiguous(1, 4, 1), group, CPU, SHAPE)
    assert (group.recovery, group.transport) == ("process restart", ""), "nobody to lose yet"
    assert _group(library, 2, CPU).transport == GROUPS[library]
    group.build(1)
    x, ids, weights = torch.randn(6, 2048).bfloat16(), torch.tensor([[0, 3]] * 6), torch.rand(6, 2)
    ids[0, 1] = -1
    exchange.begin_step(6, 6)
    for real in (6, 3):
        ids[real:] = -1
        handle = exchange.dispatch(x, ids, weights, 0)
        received = exchange.receive(handle)
        assert (received.slots_M >= 0).sum() == 2 * real - 1 and len(received.rows_M) == 4 * group.num_rows(6)
        y = torch.where((received.slots_M >= 0)[:, None], received.x_ND[received.rows_M], torch.nan)
        exchange.send_back(y, handle)
        combined = exchange.combine(handle)
        scale = torch.where(ids >= 0, weights, 0).sum(1, keepdim=True)
        torch.testing.assert_close(combined, (x.float() * scale).bfloat16())
        assert not combined[real:].any(), "padding gets zeros"


@pytest.mark.parametrize("library", GROUPS)
@pytest.mark.parametrize(("eight", "rows"), [(False, 64), (True, 128), (True, 0)])
def test_no_value_reaches_the_host(
    library: str, eight: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of the device "meta" have no values: what the host reads raises. 72 ranks rehearse
    DeepSeek-V3, then meet.
    """

    class TorchOps:
        quantise_rows = staticmethod(quantise_rows)

    monkeypatch.setattr(slot_major, "ops_of", lambda column: TorchOps())
    meta = torch.device("meta")
    group = _group(library, 72, meta)
    placement, shape = contiguous(58, 256, 72), TokenShape((128,), 8, 7168, torch.bfloat16, eight)
    exchange = SlotMajorExchange(placement, group, meta, shape)
    group.rehearse()
    room = 4 * 72 * 128  # a rank has four slots
    exchange_without_memory(exchange, rows, 128, eight, (room, room))
    group.destroy()


def _group(library: str, size: int, device: torch.device) -> SlotGroup:
    place = "experts", 0, size, HashStore(), device
    if library == "deepep":
        return DeepEPGroup(*place, DeepEPDouble(ALONE))
    return NcclEpGroup(*place, NcclEpDouble(ALONE))
