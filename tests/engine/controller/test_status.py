"""The controller's view of expert load: replicas of an expert count together."""

from __future__ import annotations

import itertools

import numpy as np

from lockstep.engine.controller.pilot import Pilot
from lockstep.engine.controller.status import ClusterStatus
from lockstep.engine.planner.settings import Settings
from lockstep.engine.protocol.bulk import RankHello
from lockstep.engine.protocol.results import StepResult
from lockstep.engine.protocol.specs import SchedulerSpec
from lockstep.parallel.mesh import Mesh

MESH = Mesh(pipeline=2, data=2)
EXPERTS_LWS = np.array([[[0, 1], [2, 0]], [[2, -1], [1, 0]]], np.int32)


def test_replicas_of_an_expert_count_together_stage_by_stage() -> None:
    pilot = Pilot(Settings(MESH, SchedulerSpec(max_running=4, max_batch_tokens=32), [40, 40], 4, 96))
    hellos = {rank: RankHello(rank, "host", 1, 40, 4, 0, 1, 2, "cpu", 3) for rank in range(4)}
    assert (hellos[0].num_layers, hellos[0].num_expert_slots, hellos[0].num_experts) == (1, 2, 3)
    status = ClusterStatus(MESH, hellos, pilot.group, itertools.count(1), EXPERTS_LWS.tobytes())

    def report(rank: int, counts: list[int]) -> None:
        packed = np.array([counts], np.int64).tobytes()
        result = StepResult(group=0, epoch=0, step=0, rank=rank, seconds=0.1, waited=0.0, expert_i64=packed)
        status.observe([result])

    def loads() -> list[list[int]]:
        status.add_up()
        return np.frombuffer(status.state([]).expert_i64, np.int64).reshape(2, 3).tolist()

    assert [rank.transports for rank in status.state([(hellos[1], "serving")]).ranks] == [""]
    status.observe([StepResult(0, 0, 0, 1, transports="gloo for experts"), StepResult(0, 0, 1, 1)])
    status.add_up()
    shown = status.state([(hellos[0], "serving"), (hellos[1], "serving")]).ranks
    assert [rank.transports for rank in shown] == ["", "gloo for experts"], "told in the first step"
    report(0, [5, 7])
    report(1, [11, 13])
    report(3, [1, 2])
    assert loads() == [[18, 7, 11], [2, 1, 0]]
    report(0, [6, 7])  # totals replace what they were
    assert loads() == [[19, 7, 11], [2, 1, 0]]
