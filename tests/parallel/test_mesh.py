"""Two factorings of one world."""

from __future__ import annotations

import itertools

import msgspec
import pytest

from lockstep.parallel.mesh import Mesh

SIZES = list(itertools.product((1, 2, 3), (1, 2, 4), (1, 2)))


def mesh_of(sizes: tuple[int, int, int]) -> Mesh:
    pipeline, data, tensor = sizes
    return Mesh(pipeline=pipeline, data=data, tensor=tensor)


@pytest.mark.parametrize("sizes", SIZES)
def test_every_rank_has_its_own_place_in_both_factorings(sizes: tuple[int, int, int]) -> None:
    mesh = mesh_of(sizes)
    places = [mesh.coordinates(rank) for rank in range(mesh.world)]
    assert sorted((p.stage, p.data, p.tensor) for p in places) == list(itertools.product(*map(range, sizes)))
    assert sorted((p.stage, p.expert) for p in places) == list(
        itertools.product(range(sizes[0]), range(mesh.experts))
    )
    assert all(p.expert == p.data * mesh.tensor + p.tensor for p in places), (
        "ranks that share sequences are neighbours among the experts'"
    )
    assert [mesh.rank(p.stage, p.data, p.tensor) for p in places] == list(range(mesh.world))


@pytest.mark.parametrize("sizes", SIZES)
def test_members_and_stages_follow_from_the_coordinates(sizes: tuple[int, int, int]) -> None:
    mesh = mesh_of(sizes)
    places = {rank: mesh.coordinates(rank) for rank in range(mesh.world)}
    for data in range(mesh.data):
        assert mesh.members(data) == tuple(rank for rank, p in places.items() if p.data == data)
        assert [rank for rank in mesh.members(data) if mesh.samples(rank)] == [mesh.reporter(data)]
        assert places[mesh.reporter(data)].stage == mesh.pipeline - 1
        assert places[mesh.reporter(data)].tensor == 0
    for rank, place in places.items():
        assert mesh.data_of_rank(rank) == place.data
        assert rank in mesh.stage_ranks(place.stage)
    assert [*itertools.chain(*map(mesh.stage_ranks, range(mesh.pipeline)))] == list(range(mesh.world))


def test_out_of_the_world() -> None:
    with pytest.raises(AssertionError, match="rank 4 of 4"):
        Mesh(data=4).coordinates(4)
    with pytest.raises(AssertionError, match="at least one rank"):
        Mesh(data=0)
    with pytest.raises(msgspec.ValidationError, match=r"`\$.data`"):
        msgspec.json.decode(b'{"data": 0}', type=Mesh)


def test_dense_groups_are_neighbours_in_a_stage() -> None:
    mesh = Mesh(pipeline=2, data=4, tensor=2, dense=4)
    places = [mesh.coordinates(rank) for rank in range(mesh.world)]
    assert [(p.stage, p.dense_group, p.dense) for p in places] == [
        (stage, group, index) for stage in range(2) for group in range(2) for index in range(4)
    ]
    assert [(p.dense_group, p.dense) for p in map(Mesh(data=2, tensor=2).coordinates, range(4))] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    ], "by default those that split attention"
    assert mesh.shares_dense and not Mesh(data=4, tensor=2, dense=2).shares_dense
    for wrong in ({"data": 3, "dense": 2}, {"data": 2, "tensor": 2, "dense": 1}):
        with pytest.raises(AssertionError, match="dense groups"):
            Mesh(**wrong)


def test_recordings_hold_the_sizes_and_those_before_dense_groups_are_read() -> None:
    mesh = Mesh(pipeline=2, data=3)
    mesh.members(1)
    encoded = msgspec.json.encode(mesh)
    assert encoded == b'{"pipeline":2,"data":3,"tensor":1,"dense":0}'
    assert msgspec.json.decode(encoded, type=Mesh) == mesh
    assert msgspec.json.decode(b'{"pipeline":2,"data":3,"tensor":1}', type=Mesh) == mesh
