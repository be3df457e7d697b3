"""Groups pairs by expert slot, within bounds known to the host: sizes never depend on data.

Every slot's run is padded to whole blocks, so that a block of a grouped product uses the weights of
one slot.

M pairs (token, choice)  S expert slots  B blocks  P = B x block places  N received tokens  D hidden
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grouping:
    """``slot_of_block_B`` int32: the slot of each block, -1 past the last. ``pair_of_place_P``
    int32: the pair at each place, in the order of pairs within a slot, and -1 for padding;
    undefined in blocks of slot -1.
    """

    block: int
    slot_of_block_B: Tensor
    pair_of_place_P: Tensor


def most_blocks(num_pairs: int, num_slots: int, block: int) -> int:
    """Most blocks that ``num_pairs`` pairs can need: as many slots as possible hold a single pair,
    the other blocks are full.
    """
    begun = min(num_pairs, num_slots)
    return begun + (num_pairs - begun) // block


def group_pairs(slots_M: Tensor, counts_S: Tensor, block: int) -> Grouping:
    """Groups slots_M int64. Slots of -1 are padding and get no place. counts_S int64 is increased
    by the pairs of each slot.
    """
    num_slots, device = len(counts_S), slots_M.device
    num_blocks = most_blocks(len(slots_M), num_slots, block)
    counts = torch.bincount(slots_M + 1, minlength=num_slots + 1)
    counts_S += counts[1:]
    ends_S = (-(-counts[1:] // block)).cumsum(0)
    order_M = slots_M.argsort(stable=True)
    sorted_M = slots_M[order_M]
    first_pair_S = counts.cumsum(0)[:-1]
    first_block_S = ends_S + counts[1:].neg() // block  # -(count // -block) blocks before the end
    index_M = torch.arange(len(slots_M), device=device)
    slot_M = sorted_M.clamp_min(0)
    place_M = first_block_S[slot_M] * block + index_M - first_pair_S[slot_M]
    spare = num_blocks * block  # padding pairs go to an extra place, which is cut off
    pair_of_place = torch.full((spare + 1,), -1, dtype=torch.int32, device=device)
    pair_of_place[torch.where(sorted_M >= 0, place_M, spare)] = order_M.to(torch.int32)
    slot_B = torch.searchsorted(ends_S, torch.arange(num_blocks, device=device), right=True)
    slot_of_block_B = torch.where(slot_B < num_slots, slot_B, -1).to(torch.int32)
    return Grouping(block, slot_of_block_B, pair_of_place[:spare])


def permute(x_ND: Tensor, rows_M: Tensor, grouping: Grouping) -> Tensor:
    """Copies rows of x to their places: [P, D], zero where there is no pair. rows_M int64 into
    x_ND.
    """
    pair_P = _pairs(grouping)
    return (
        torch.where((pair_P >= 0)[:, None], x_ND[rows_M[pair_P.clamp_min(0)]], 0)
        if len(rows_M)
        else x_ND.new_zeros(0, x_ND.shape[1])
    )


def unpermute(y_PD: Tensor, grouping: Grouping, num_pairs: int) -> Tensor:
    """Copies rows back to the order of pairs: [M, D], zero for pairs without a place."""
    pair_P = _pairs(grouping).to(torch.int64)
    y_MD = y_PD.new_zeros(num_pairs + 1, y_PD.shape[1])
    y_MD[torch.where(pair_P >= 0, pair_P, num_pairs)] = y_PD
    return y_MD[:num_pairs]


def _pairs(grouping: Grouping) -> Tensor:
    """``pair_of_place_P``, with -1 in unused blocks."""
    used_P = (grouping.slot_of_block_B >= 0).repeat_interleave(grouping.block)
    return torch.where(used_P, grouping.pair_of_place_P, -1)
