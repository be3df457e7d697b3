"""A request that kills a rank on every replay is found; its neighbours go on."""

from __future__ import annotations

import pytest

from lockstep.engine.protocol.frontends import Rejected
from lockstep.parallel.mesh import Mesh
from support.engine.planner.planner_world import World


def prompt(number: int) -> list[int]:
    return [number] * 9


def serve(world: World, poison: int, deaths: int, most: int = 12) -> int:
    """Runs the world; a rank whose plan computes the request ``poison`` dies instead. Returns the
    number of deaths, at most ``deaths`` + 1.
    """
    killed = 0
    for _ in range(3000):
        world.plan()
        for rank in range(len(world.ranks)):
            while world.stage(rank):
                pass
            request = world.planner.group.open.get((0, poison))
            named = world.plans[rank] and request in world.planner.group.unfinished(rank)
            if named and killed <= deaths:
                killed += 1
                world.replace(rank)
                continue
            world.execute(rank)
            world.deliver(rank)
        if world.planner.idle():
            return killed
    raise AssertionError("it does not end")


@pytest.mark.parametrize("num_requests", [1, 2, 8])
def test_a_request_that_kills_ranks_ends_and_the_others_do_not(num_requests: int) -> None:
    world = World(Mesh(data=1), pages=60, page_size=4, max_len=64)
    handles = [world.submit(prompt(number), 6, stop=False) for number in range(num_requests)]
    poison = num_requests // 2
    killed = serve(world, poison, deaths=10)
    assert killed == (2 if num_requests == 1 else 3)
    rejected = world.rejected.pop(poison)
    assert isinstance(rejected, Rejected) and rejected.status == 500 and "died repeatedly" in rejected.reason
    for handle in set(handles) - {poison}:
        assert world.tokens[handle] == world.expected(handle)
    assert not world.planner.group.trials._records, "those that went on are cleared"


def test_deaths_with_tokens_in_between_find_nobody() -> None:
    world = World(Mesh(data=1), pages=60, page_size=4, max_len=64)
    handle = world.submit(prompt(1), 30, stop=False)
    for _ in range(6):
        tokens = len(world.tokens[handle])
        while len(world.tokens[handle]) == tokens:
            world.round()
        world.plan()
        world.replace(0)
    world.run()
    assert world.tokens[handle] == world.expected(handle) and not world.rejected


def test_a_request_that_has_ended_stands_no_trial() -> None:
    """The rank that samples has answered, its neighbour in the tensor group has not, and dies."""
    world = World(Mesh(tensor=2), pages=32, page_size=4, max_len=64)
    handle = world.submit(prompt(1), 1)
    world.tidy()
    for rank in range(2):
        while world.stage(rank):
            pass
    assert world.plan() and world.execute(0) and world.deliver(0)
    assert handle in world.finish and not world.planner.group.rows.state.any()
    assert not world.planner.group.unfinished(0)
    world.replace(1)
    world.submit(prompt(2), 3)
    world.run()
    assert len(world.tokens) == 2 and not world.rejected
