"""The specification of a controller that follows one that died."""

from __future__ import annotations

from pathlib import Path

import msgspec
from msgspec import structs

from lockstep.engine.controller.status import gathering_state
from lockstep.engine.protocol.cluster_state import RankState
from lockstep.engine.protocol.specs import ControllerSpec, SchedulerSpec, Succession
from lockstep.launch.cluster.cluster import Task
from lockstep.launch.run.tasks import successor_task
from lockstep.parallel.mesh import Mesh

ADDRESSES = ("tcp://a:1", "tcp://a:2", "tcp://a:3")


def task(recording: str | None = None) -> Task:
    spec = ControllerSpec(
        host="a",
        secret="s",
        public="p",
        allowed=("x",),
        mesh=Mesh(),
        scheduler=SchedulerSpec(),
        model_max_len=64,
        max_len=None,
        recording=recording,
    )
    return Task("controller", 0, msgspec.json.encode(spec), module="some.module")


def spec_of(task: Task) -> ControllerSpec:
    assert task.module == "some.module"
    return msgspec.json.decode(task.spec, type=ControllerSpec)


def test_it_knows_the_addresses_the_last_epoch_and_the_limits() -> None:
    state = structs.replace(
        gathering_state("", 7), phase="draining", epoch=5, max_len=60, page_size=4, prefix_caching=True
    )
    first = successor_task(task(), ADDRESSES, state)
    assert spec_of(first).succession == Succession(
        life=1, addresses=ADDRESSES, epoch=5, max_len=60, page_size=4, draining=True
    )
    second = successor_task(first, ADDRESSES, gathering_state("", 8))
    assert spec_of(second).succession == Succession(
        life=2, addresses=ADDRESSES, epoch=5, max_len=60, page_size=4, draining=True
    ), "a state without limits says nothing"
    rank = RankState(1, "b", 7, "lost", 0, 0, 0, 0, 0.0, 0.0)
    for phase, lost in (("serving", (1,)), ("recovering", ())):
        without = structs.replace(
            state, phase=phase, ranks=(structs.replace(rank, rank=0, state="serving"), rank)
        )
        succession = spec_of(successor_task(task(), ADDRESSES, without)).succession
        assert succession is not None and succession.lost == lost, "all wait for it unless the others served"
    untold = spec_of(successor_task(task(), ADDRESSES, None)).succession
    assert untold == Succession(life=1, addresses=ADDRESSES, epoch=0, max_len=0, page_size=0)


def test_it_records_to_a_file_that_did_not_exist(tmp_path: Path) -> None:
    path = tmp_path / "run"
    first = successor_task(task(str(path)), ADDRESSES, None)
    assert spec_of(first).recording == f"{path}.2"
    (tmp_path / "run.3").touch()
    (tmp_path / "run.2").touch()
    assert spec_of(successor_task(task(str(path)), ADDRESSES, None)).recording == f"{path}.4"
    assert spec_of(successor_task(first, ADDRESSES, None)).recording == f"{path}.4"
    assert spec_of(successor_task(task(), ADDRESSES, None)).recording is None
