"""Grouped pairs: the guarantees of a grouping in both columns, and the rows moved by it."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from lockstep.kernels.reference import grouping as reference
from lockstep.kernels.reference.grouping import Grouping, most_blocks
from lockstep.kernels.triton import grouping as triton_grouping
from support.grids import pairwise
from support.kernels.poison import DEVICE, poisoned

COLUMNS = pytest.mark.parametrize("column", [reference, triton_grouping], ids=["reference", "triton"])


def random_slots(num_pairs: int, num_slots: int) -> list[int]:
    return torch.randint(-1, num_slots, (num_pairs,), generator=torch.Generator().manual_seed(0)).tolist()


# Slots of the pairs, and the number of slots.
CASES = {
    "spread": ([3, 0, 1, 3, 2, 2, 0, 3], 4),
    "one slot": ([1] * 37, 5),
    "padding": ([-1, 2, -1, 0, 0, -1, 3, -1], 7),
    "only padding": ([-1] * 9, 3),
    "last slot": ([6], 7),
    "none": ([], 3),
    "as many blocks as possible": ([0, 1, 2] + [0] * 16, 3),
    "many": (random_slots(700, 19), 19),
    "parts": (random_slots(9001, 3), 3),
}


@COLUMNS
@pytest.mark.parametrize("block", [4, 16])
@pytest.mark.parametrize("case", CASES)
def test_every_pair_has_one_place_among_its_slot(column: ModuleType, case: str, block: int) -> None:
    slots, num_slots = CASES[case]
    counts = torch.full((num_slots,), 5, dtype=torch.int64, device=DEVICE)
    with poisoned():
        grouping = column.group_pairs(torch.tensor(slots, dtype=torch.int64, device=DEVICE), counts, block)
    num_blocks = most_blocks(len(slots), num_slots, block)
    assert grouping.slot_of_block_B.shape == (num_blocks,) and grouping.slot_of_block_B.dtype == torch.int32
    assert (
        grouping.pair_of_place_P.shape == (num_blocks * block,)
        and grouping.pair_of_place_P.dtype == torch.int32
    )
    blocks = grouping.slot_of_block_B.tolist()
    places = grouping.pair_of_place_P.view(num_blocks, block).tolist()
    expected_blocks = [slot for slot in range(num_slots) for _ in range(-(-slots.count(slot) // block))]
    assert blocks == expected_blocks + [-1] * (num_blocks - len(expected_blocks))
    for slot in range(num_slots):
        mine = [pair for at, pair in zip(blocks, places, strict=True) if at == slot for pair in pair]
        pairs = [pair for pair, at in enumerate(slots) if at == slot]
        assert mine == pairs + [-1] * (-len(pairs) % block)
    assert counts.tolist() == [5 + slots.count(slot) for slot in range(num_slots)]


@pytest.mark.parametrize("block", [1, 4, 16])
@pytest.mark.parametrize(("num_pairs", "num_slots"), [(0, 3), (1, 3), (3, 3), (40, 3), (5, 9)])
def test_no_routing_needs_more_blocks(num_pairs: int, num_slots: int, block: int) -> None:
    begun = min(num_pairs, num_slots)
    worst = list(range(begun)) + [0] * (num_pairs - begun)
    needed = sum(-(-worst.count(slot) // block) for slot in range(num_slots))
    assert needed == most_blocks(num_pairs, num_slots, block)


@COLUMNS
@pairwise(
    {
        "case": ["spread", "one slot", "padding", "only padding", "none"],
        "dtype": [torch.float32, torch.float16, torch.bfloat16, torch.int8],
        "hidden": [1, 24, 1500],
    }
)
def test_rows_there_and_back(column: ModuleType, case: str, dtype: torch.dtype, hidden: int) -> None:
    slots, num_slots = CASES[case]
    slots_M = torch.tensor(slots, dtype=torch.int64, device=DEVICE)
    rows_M = torch.randint(0, 5, (len(slots),), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    x_ND = (torch.randn(5, hidden, generator=torch.Generator().manual_seed(2)) * 30).to(DEVICE, dtype)
    with poisoned():
        grouping = column.group_pairs(slots_M, torch.zeros(num_slots, dtype=torch.int64, device=DEVICE), 4)
        x_PD = column.permute(x_ND, rows_M, grouping)
    pairs = used_pairs(grouping)
    assert x_PD.dtype == dtype
    assert (
        torch.equal(x_PD[pairs >= 0].float(), x_ND[rows_M[pairs[pairs >= 0]]].float())
        and not x_PD[pairs < 0].float().any()
    )
    x_PD[pairs < 0] = float("nan") if dtype.is_floating_point else 77
    with poisoned():
        y_MD = column.unpermute(x_PD, grouping, len(slots))
    expected = torch.where((slots_M >= 0)[:, None], x_ND.float()[rows_M], 0)
    assert torch.equal(y_MD.float(), expected)


def used_pairs(grouping: Grouping) -> torch.Tensor:
    used_P = (grouping.slot_of_block_B >= 0).repeat_interleave(grouping.block)
    return torch.where(used_P, grouping.pair_of_place_P, -1)
