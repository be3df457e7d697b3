"""The thinned grids hold what they promise."""

from __future__ import annotations

from itertools import combinations

import pytest

from support.grids import pairwise

DIMENSIONS = {"a": range(4), "b": range(3), "c, d": [(0, "x"), (1, "y"), (2, "z")], "e": [False, True]}
GRID = pairwise(DIMENSIONS)


def test_every_two_values_meet() -> None:
    names, cases = GRID.args
    assert names == "a, b, c, d, e" and len(cases) <= 12
    rows = [case.values for case in cases]
    for first, second in combinations([0, 1, 2, 4], 2):
        sizes = {0: 4, 1: 3, 2: 3, 4: 2}
        assert len({(row[first], row[second]) for row in rows}) == sizes[first] * sizes[second]
    assert all(row[3] == "xyz"[row[2]] for row in rows)


@GRID
def test_names_reach_the_test(
    a: int, b: int, c: int, d: str, e: bool, request: pytest.FixtureRequest
) -> None:
    assert request.node.callspec.id == f"{a}-{b}-{c}x{d}-{e}"
