"""Two factorings of one world."""

from __future__ import annotations

import itertools

import pytest

from lockstep.parallel.mesh import Mesh


@pytest.mark.parametrize("sizes", list(itertools.product((1, 2, 3), (1, 2, 4), (1, 2))))
def test_every_rank_has_its_own_place_in_both_factorings(sizes: tuple[int, int, int]) -> None:
    mesh = Mesh(*sizes)
    places = [mesh.coordinates(rank) for rank in range(mesh.world)]
    assert sorted((p.stage, p.data, p.tensor) for p in places) == list(itertools.product(*map(range, sizes)))
    assert sorted((p.stage, p.expert) for p in places) == list(
        itertools.product(range(sizes[0]), range(mesh.experts))
    )
    assert all(p.expert == p.data * mesh.tensor + p.tensor for p in places), (
        "ranks that share sequences are neighbours among the experts'"
    )


def test_out_of_the_world() -> None:
    with pytest.raises(AssertionError, match="rank 4 of 4"):
        Mesh(1, 4, 1).coordinates(4)
    with pytest.raises(AssertionError, match="at least one rank"):
        Mesh(1, 0, 1)
