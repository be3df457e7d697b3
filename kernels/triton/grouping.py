"""Triton column of ``grouping``: counts, places and moved rows; the host sees no count.

Roofline: ``group_pairs`` reads slots_M twice per slot from the L2 cache (16 S M bytes) and writes 4
(P + B), in parallel over slots and parts of the pairs: one card of a rack receives 300,000 pairs
for a few slots, nearly all of them padding. It uses no atomics, so places are the same in every
run. ``permute`` and ``unpermute`` are copies: 2 x M x D x itemsize bytes, and the zeros they write.

M pairs (token, choice)  S expert slots  Q parts of the pairs  B blocks  P places
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.grouping import Grouping, most_blocks
from .target import power_of_two

_COPIED_COLUMNS = 1024
_CHUNK = 1024  # pairs that a program looks at at once
_PART = 4 * _CHUNK  # pairs that a program looks at in all
_PARTS_AT_ONCE = 16  # parts whose counts a program adds up at once


def group_pairs(slots_M: Tensor, counts_S: Tensor, block: int) -> Grouping:
    """Same as ``grouping.group_pairs``."""
    num_pairs = len(slots_M)
    num_slots = len(counts_S)
    device = slots_M.device
    num_blocks = most_blocks(num_pairs, num_slots, block)
    slot_of_block_B = torch.empty(num_blocks, dtype=torch.int32, device=device)
    pair_of_place_P = torch.empty(num_blocks * block, dtype=torch.int32, device=device)
    if num_pairs:
        num_parts = triton.cdiv(num_pairs, _PART)
        counts_QS = torch.empty(num_parts, num_slots, dtype=torch.int32, device=device)
        grid = num_slots, num_parts
        _count_kernel[grid](slots_M, counts_QS, num_pairs, S=num_slots, PART=_PART, CHUNK=_CHUNK)
        _place_kernel[grid](
            slots_M,
            counts_QS,
            counts_S,
            slot_of_block_B,
            pair_of_place_P,
            num_pairs,
            num_blocks,
            num_parts,
            S=num_slots,
            S_PAD=power_of_two(num_slots),
            BLOCK=block,
            PART=_PART,
            PARTS=_PARTS_AT_ONCE,
            CHUNK=_CHUNK,
        )
    return Grouping(block, slot_of_block_B, pair_of_place_P)


def permute(x_ND: Tensor, rows_M: Tensor, grouping: Grouping) -> Tensor:
    """Same as ``grouping.permute``."""
    assert x_ND.stride(1) == 1
    places, hidden = len(grouping.pair_of_place_P), x_ND.shape[1]
    out_PD = x_ND.new_empty(places, hidden)
    if places:
        _permute_kernel[(places,)](
            x_ND,
            x_ND.stride(0),
            rows_M,
            grouping.pair_of_place_P,
            grouping.slot_of_block_B,
            out_PD,
            hidden,
            BLOCK=grouping.block,
            COLUMNS=min(_COPIED_COLUMNS, power_of_two(hidden)),
        )
    return out_PD


def unpermute(y_PD: Tensor, grouping: Grouping, num_pairs: int) -> Tensor:
    """Same as ``grouping.unpermute``."""
    hidden = y_PD.shape[1]
    y_MD = y_PD.new_zeros(num_pairs, hidden)
    if len(y_PD):
        _unpermute_kernel[(len(y_PD),)](
            y_PD,
            grouping.pair_of_place_P,
            grouping.slot_of_block_B,
            y_MD,
            hidden,
            BLOCK=grouping.block,
            COLUMNS=min(_COPIED_COLUMNS, power_of_two(hidden)),
        )
    return y_MD


@triton.jit(do_not_specialize=["num_pairs"])
def _count_kernel(slots_ptr, counts_ptr, num_pairs, S: tl.constexpr, PART: tl.constexpr, CHUNK: tl.constexpr):
    """Counts the pairs of one slot in one part."""
    slot = tl.program_id(0)
    part = tl.program_id(1)
    found = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, PART, CHUNK):
        pair = part * PART + start + tl.arange(0, CHUNK)
        slots = tl.load(slots_ptr + pair, mask=pair < num_pairs, other=-1)
        found += (slots == slot).to(tl.int32)
    tl.store(counts_ptr + part * S + slot, tl.sum(found, 0))


@triton.jit(do_not_specialize=["num_pairs", "num_blocks", "num_parts"])
def _place_kernel(
    slots_ptr,
    counts_ptr,
    total_counts_ptr,
    slot_of_block_ptr,
    pair_of_place_ptr,
    num_pairs,
    num_blocks,
    num_parts,
    S: tl.constexpr,
    S_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Places the pairs of one slot in one part, in order. The program of part 0 also does the rest
    for its slot: its blocks, the padding of the last one, and the running count; that of slot 0
    marks the unused blocks.
    """
    slot = tl.program_id(0)
    part = tl.program_id(1)
    s = tl.arange(0, S_PAD)
    q = tl.arange(0, PARTS)
    counts = tl.zeros((S_PAD,), tl.int32)
    earlier = tl.zeros((S_PAD,), tl.int32)
    for start in range(0, num_parts, PARTS):
        inside = ((start + q) < num_parts)[:, None] & (s < S)[None, :]
        found = tl.load(counts_ptr + (start + q)[:, None] * S + s[None, :], mask=inside, other=0)
        counts += tl.sum(found, 0)
        earlier += tl.sum(tl.where(((start + q) < part)[:, None], found, 0), 0)
    blocks = (counts + BLOCK - 1) // BLOCK
    first = tl.sum(tl.where(s < slot, blocks, 0), 0)
    begin = first * BLOCK
    placed = tl.sum(tl.where(s == slot, earlier, 0), 0)
    lane = tl.arange(0, CHUNK)
    for start in range(0, PART, CHUNK):
        pair = part * PART + start + lane
        match = (tl.load(slots_ptr + pair, mask=pair < num_pairs, other=-1) == slot).to(tl.int32)
        tl.store(pair_of_place_ptr + begin + placed + tl.cumsum(match, 0) - 1, pair, mask=match > 0)
        placed += tl.sum(match, 0)

    if part == 0:
        mine = tl.sum(tl.where(s == slot, blocks, 0), 0)
        count = tl.sum(tl.where(s == slot, counts, 0), 0)
        tl.store(total_counts_ptr + slot, tl.load(total_counts_ptr + slot) + count)
        pad = count + tl.arange(0, BLOCK)
        tl.store(pair_of_place_ptr + begin + pad, -1, mask=pad < mine * BLOCK)
        for start in range(0, mine, CHUNK):
            tl.store(slot_of_block_ptr + first + start + lane, slot, mask=start + lane < mine)
        if slot == 0:
            for start in range(tl.sum(blocks, 0), num_blocks, CHUNK):
                tl.store(slot_of_block_ptr + start + lane, -1, mask=start + lane < num_blocks)


@triton.jit
def _permute_kernel(
    x_ptr,
    x_stride,
    rows_ptr,
    pair_of_place_ptr,
    slot_of_block_ptr,
    out_ptr,
    D,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One place per program."""
    place = tl.program_id(0).to(tl.int64)
    used = tl.load(slot_of_block_ptr + place // BLOCK) >= 0
    pair = tl.load(pair_of_place_ptr + place, mask=used, other=-1)
    row = tl.load(rows_ptr + pair, mask=pair >= 0, other=0)
    read = tl.where(pair >= 0, D, 0)
    for start in range(0, D, COLUMNS):
        d = start + tl.arange(0, COLUMNS)
        x = tl.load(x_ptr + row * x_stride + d, mask=d < read, other=0.0)
        tl.store(out_ptr + place * D + d, x, mask=d < D)


@triton.jit
def _unpermute_kernel(
    y_ptr, pair_of_place_ptr, slot_of_block_ptr, out_ptr, D, BLOCK: tl.constexpr, COLUMNS: tl.constexpr
):
    """One place per program; places without a pair write nothing."""
    place = tl.program_id(0).to(tl.int64)
    if tl.load(slot_of_block_ptr + place // BLOCK) >= 0:
        pair = tl.load(pair_of_place_ptr + place).to(tl.int64)
        if pair >= 0:
            for start in range(0, D, COLUMNS):
                d = start + tl.arange(0, COLUMNS)
                tl.store(out_ptr + pair * D + d, tl.load(y_ptr + place * D + d, mask=d < D), mask=d < D)
