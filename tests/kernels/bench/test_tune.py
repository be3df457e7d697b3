"""The search for tile sizes, with a fake clock."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from lockstep.kernels.bench.cases import cases
from lockstep.kernels.bench.tune import DECODE, PROGRAMS, groups, jobs, search
from lockstep.kernels.triton.tiles import DEFAULT, AttendTile, ProductTile, Tiles

GROUPS = {group.name: group for group in groups()}


def test_every_tile_is_searched_on_cases_of_the_benchmark() -> None:
    known = {(case.op, case.shape) for case in cases()}
    assert {(op, shape) for op, shape, _ in jobs(list(GROUPS.values()))} <= known
    searched = {name.partition("[")[0] for name in GROUPS}
    assert searched == {
        field for field in Tiles.__dataclass_fields__ if field not in ("most_absorbed", "prefill_bytes")
    }
    for field in ("experts", "experts_fp8", "linear_fp8"):
        assert {name for name in GROUPS if name.startswith(f"{field}[")} == {
            f"{field}[{at}]" for at in range(len(getattr(DEFAULT, field)))
        }


def test_the_fastest_over_all_cases_is_chosen_stage_by_stage() -> None:
    wanted = AttendTile(16, 32, 4, 4, programs=8)

    def clock(case: tuple[str, str], tiles: Tiles) -> float:
        tile = tiles.decode
        if tile.stages == 6:
            return math.inf  # does not fit
        slow = 1 + (tile.keys != wanted.keys) + (tile.warps != wanted.warps)
        return 100.0 * slow / tile.programs if case[1].endswith("1 x 32768") else 10.0 * slow

    tiles, line = search(GROUPS["decode"], DEFAULT, clock)
    assert tiles.decode == wanted and wanted.programs == max(PROGRAMS) and (16, 32, 4, 6) in DECODE
    assert tiles == DEFAULT.__class__(**{**vars(DEFAULT), "decode": wanted}) and line.startswith(
        "decode: worst candidate "
    )


def test_both_products_are_searched_and_other_entries_left() -> None:
    def clock(case: tuple[str, str], tiles: Tiles) -> float:
        up, down = tiles.experts[0].up, tiles.experts[0].down
        return 1.0 + (up != ProductTile(64, 128, 4, 4)) + (down != ProductTile(16, 128, 4, 6))

    tiles, _ = search(GROUPS["experts[0]"], DEFAULT, clock)
    assert (tiles.experts[0].up, tiles.experts[0].down) == (
        ProductTile(64, 128, 4, 4),
        ProductTile(16, 128, 4, 6),
    )
    assert tiles.experts[1:] == DEFAULT.experts[1:]


def test_a_default_that_nothing_beats_stays() -> None:
    tiles, _ = search(GROUPS["prefill"], DEFAULT, lambda case, tiles: 1.0 if tiles == DEFAULT else math.inf)
    assert tiles == DEFAULT


@pytest.mark.skipif(torch.cuda.is_available(), reason="would tune the card")
def test_without_a_card_there_is_nothing_to_tune() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "lockstep.kernels.bench.tune"],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 1 and "no NVIDIA card here" in result.stderr
