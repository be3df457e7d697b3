"""The blocks that a controller takes over from the one before it."""

from __future__ import annotations

import numpy as np

from lockstep.engine.controller.inheritance import Inheritance
from lockstep.engine.controller.pilot import Pilot
from lockstep.engine.planner.settings import Settings
from lockstep.engine.protocol.bulk import Published, RankHello
from lockstep.engine.protocol.specs import SchedulerSpec
from lockstep.parallel.mesh import Mesh


def hello(rank: int, epoch: int = -1) -> RankHello:
    return RankHello(rank, "here", rank, 8, 4, 0, 0, 0, "cpu", epoch=epoch)


def published(rank: int, blocks: dict[int, int]) -> Published:
    """``blocks``: a number that stands for the hash, by page."""
    hashes = b"".join(bytes([number]) * 16 for number in blocks.values())
    return Published(rank, np.array(list(blocks), np.int32).tobytes(), hashes)


def handed_over(inheritance: Inheritance, mesh: Mesh) -> list[int]:
    """The cached pages of each data index that the planner is given."""
    pilot = Pilot(Settings(mesh, SchedulerSpec(max_running=2), [8] * mesh.data, 4, 16))
    kept = inheritance.hand_over(mesh, [8] * mesh.data, pilot)
    pilot.planner.check()
    cached: list[int] = pilot.group.kv.cached().tolist()
    assert sum(cached) == kept
    return cached


def test_epochs_go_on_after_the_highest_that_anybody_knows() -> None:
    inheritance = Inheritance(3)
    assert inheritance.first_epoch == 4 and Inheritance().first_epoch == 0
    inheritance.hello(hello(0, 7))
    inheritance.hello(hello(1))
    assert inheritance.first_epoch == 8


def test_each_data_index_keeps_its_blocks() -> None:
    inheritance = Inheritance(3)
    inheritance.published(published(0, {1: 1, 2: 2, 7: 3}))
    inheritance.published(published(1, {0: 1}))
    for rank in range(2):
        inheritance.hello(hello(rank, 3))
    assert handed_over(inheritance, Mesh(data=2)) == [3, 1]


def test_a_block_counts_where_all_members_hold_it_in_the_same_page() -> None:
    inheritance = Inheritance(3)
    inheritance.published(published(0, {1: 1, 2: 2, 3: 3, 9: 4}))
    inheritance.published(published(1, {1: 1, 2: 5, 4: 3, 9: 4}))
    for rank in range(2):
        inheritance.hello(hello(rank, 3))
    assert handed_over(inheritance, Mesh(tensor=2)) == [1], "page 2 differs, 9 is beyond the pool"


def test_a_rank_that_was_replaced_holds_nothing() -> None:
    inheritance = Inheritance(3)
    for rank in range(2):
        inheritance.published(published(rank, {1: 1}))
        inheritance.hello(hello(rank, 3))
    inheritance.hello(hello(1))
    assert handed_over(inheritance, Mesh(tensor=2)) == [0]
    inheritance.lost(0)
    assert set(inheritance.hellos) == {1}
