"""The timeline on the controller: marks plans, hands spans on, and ends, whatever happens."""

from __future__ import annotations

import math
from array import array

import pytest

from lockstep.engine.controller import step_timeline
from lockstep.engine.controller.step_timeline import StepTimeline
from lockstep.engine.planner.group_plan import GroupPlan
from lockstep.engine.protocol.message import Message
from lockstep.engine.protocol.plan import Header, Mode, Section
from lockstep.engine.protocol.results import StepResult
from lockstep.engine.protocol.timeline import AskTimeline, StepSpans, TimelineEnd
from lockstep.parallel.mesh import Mesh


class Clocked:
    """A timeline of two ranks in epoch 3, on a clock that the test moves."""

    def __init__(self) -> None:
        self.now, self.step = 100.0, 0
        self.sent: list[tuple[bytes, Message]] = []
        self.timeline = StepTimeline(Mesh(data=2), lambda name, message: self.sent.append((name, message)))

    def ask(self, steps: int, seconds: float = 10.0, frontend: bytes = b"f0") -> None:
        self.timeline.ask(frontend, AskTimeline(7, steps, seconds), 3, self.now)

    def plan(self, epoch: int = 3, sections: int = 2) -> GroupPlan:
        """Plans a step, as the controller does."""
        header = Header(0, epoch, self.step, self.step - 1, Mode.DECODE, 8)
        plan = GroupPlan(header, {data: Section() for data in range(sections)})
        if self.timeline.is_open:
            plan = self.timeline.mark(plan, self.now)
        if plan.header.trace:
            self.timeline.sent(plan.header, sections, 16, (self.now, self.now + 0.001))
        self.step += 1
        return plan

    def answer(self, rank: int, step: int, num_spans: int = 1, epoch: int = 3) -> None:
        self.timeline.answered([StepResult(0, epoch, step, rank)], self.now)
        times = bytes(16 * num_spans)
        self.timeline.take(StepSpans(rank, epoch, step, 0.0, 1.0, "clock", b"", times))

    def look(self, epoch: int = 3, reason: str = "") -> TimelineEnd | None:
        """The end, once there is one."""
        self.timeline.look(epoch, reason, self.now)
        ends = [message for _, message in self.sent if isinstance(message, TimelineEnd)]
        return ends[-1] if ends else None

    def spans(self) -> list[tuple[int, int]]:
        return [(message.rank, message.step) for _, message in self.sent if isinstance(message, StepSpans)]


def test_so_many_plans_are_marked_and_their_spans_handed_on() -> None:
    clocked = Clocked()
    assert not clocked.timeline.is_open and not clocked.plan().header.trace
    clocked.ask(2)
    assert [clocked.plan().header.trace for _ in range(3)] == [True, True, False]
    for step in (0, 1, 3):  # 0 and 3 were not marked
        clocked.answer(0, step)
    clocked.answer(1, 1)
    assert clocked.look() is None, "step 2 is owed"
    clocked.now += 1
    clocked.answer(0, 2)
    clocked.answer(1, 2)
    end = clocked.look()
    assert end is not None and (end.id, end.reason, end.status) == (7, "", 200)
    assert clocked.spans() == [(0, 1), (1, 1), (0, 2), (1, 2)]
    assert {name for name, _ in clocked.sent} == {b"f0"}
    assert array("q", end.steps_i64).tolist() == [3, 1, 1, 8, 16, 3, 2, 1, 8, 16]
    assert array("d", end.times_f64).tolist() == [100.0, 100.001] * 2
    assert array("d", end.answered_f64).tolist() == [100.0, 100.0, 101.0, 101.0]
    assert not clocked.timeline.is_open and not clocked.plan().header.trace


def test_a_step_without_a_data_index_owes_no_spans_of_it() -> None:
    clocked = Clocked()
    clocked.ask(1)
    clocked.plan(sections=1)
    clocked.answer(0, 0)
    end = clocked.look()
    assert end is not None and end.reason == ""
    answered = array("d", end.answered_f64)
    assert answered[0] == 100.0 and math.isnan(answered[1])


def test_one_timeline_at_a_time() -> None:
    clocked = Clocked()
    clocked.ask(2)
    clocked.ask(2, frontend=b"f1")
    assert [name for name, message in clocked.sent if isinstance(message, TimelineEnd)] == [b"f1"]
    refusal = clocked.sent[0][1]
    assert isinstance(refusal, TimelineEnd) and refusal.status == 409 and "Another timeline" in refusal.reason
    assert clocked.plan().header.trace, "the first goes on"


def test_without_work_it_ends_in_time() -> None:
    clocked = Clocked()
    clocked.ask(64, seconds=2.0)
    clocked.now += 1.9
    assert clocked.look() is None
    clocked.now += 0.2
    end = clocked.look()
    assert end is not None and end.reason == "0 of 64 steps were planned within 2 s"


def test_plans_after_its_time_are_not_marked_and_ranks_may_finish() -> None:
    clocked = Clocked()
    clocked.ask(64, seconds=2.0)
    clocked.plan()
    clocked.now += 2.1
    assert not clocked.plan().header.trace
    assert clocked.look() is None, "spans of step 0 are owed"
    clocked.answer(0, 0)
    clocked.answer(1, 0)
    end = clocked.look()
    assert end is not None and end.reason == "1 of 64 steps were planned within 2 s"


def test_a_silent_rank_does_not_hold_it() -> None:
    clocked = Clocked()
    clocked.ask(1, seconds=2.0)
    clocked.plan()
    clocked.answer(0, 0)
    clocked.now += 2.0 + step_timeline._PATIENCE
    assert clocked.look() is None
    clocked.now += 0.1
    end = clocked.look()
    assert end is not None and "spans of 1 steps of ranks did not come within 5 s" in end.reason
    assert clocked.spans() == [(0, 0)]


def test_a_lost_rank_ends_it_with_what_is_there() -> None:
    clocked = Clocked()
    clocked.ask(64)
    for _ in range(3):
        clocked.plan()
    clocked.answer(0, 0)
    clocked.answer(1, 0)
    assert not clocked.plan(epoch=4).header.trace, "a step of another epoch"
    end = clocked.look(epoch=4, reason="rank 1 is lost: killed")
    assert end is not None and end.reason == "epoch 4 began after 3 of 64 steps: rank 1 is lost: killed"
    clocked.timeline.take(StepSpans(0, 3, 1, 0.0, 1.0, "clock"))
    assert clocked.spans() == [(0, 0), (1, 0)], "late ones belong to no timeline"


def test_its_size_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_timeline, "MOST_SPANS", 10)
    clocked = Clocked()
    clocked.ask(64)
    for _ in range(2):
        clocked.plan()
    clocked.answer(0, 0, num_spans=4)
    clocked.answer(1, 0, num_spans=4)
    clocked.answer(0, 1, num_spans=4)
    assert not clocked.plan().header.trace
    clocked.answer(1, 1, num_spans=2)
    end = clocked.look()
    assert end is not None and "2 of 64 steps have all 10 spans" in end.reason and end.num_dropped == 4
    assert clocked.spans() == [(0, 0), (1, 0), (1, 1)]
