"""The timeline as a trace: Chrome's format, spans that nest, clocks of other hosts, partial
ones.
"""

from __future__ import annotations

import json
import math
from array import array
from typing import Any

import pytest

from lockstep.engine.protocol.timeline import Span, StepSpans, TimelineEnd, Track
from lockstep.engine.tracing.timeline import chrome_trace
from lockstep.parallel.mesh import Mesh
from support.engine.chrome_trace import check_trace, spans_of

HOSTS = {0: "near", 1: "far"}


def step_spans(rank: int, step: int, begun: float, clock: str, ahead: float = 0.0) -> StepSpans:
    """A step of 10 ms whose attention, of the second microbatch, contains a wait."""
    begun += ahead
    rows = [
        (Span.FORWARD, Track.STEP, -1, begun + 0.001, begun + 0.009),
        (Span.TENSOR_WAIT, Track.SECOND, 3, begun + 0.003, begun + 0.004),
        (Span.ATTENTION, Track.SECOND, 3, begun + 0.002, begun + 0.005),
    ]
    kinds = array("i", [number for row in rows for number in row[:3]]).tobytes()
    times = array("d", [time for row in rows for time in row[3:]]).tobytes()
    return StepSpans(rank, 4, step, begun, begun + 0.010, clock, kinds, times)


def end_of(steps: int, answered: Any, reason: str = "") -> TimelineEnd:
    """Plans 7, 8, ... which leave 20 ms apart, the first one at 100 s."""
    facts = [number for index in range(steps) for number in (4, 7 + index, 2, 64, 50)]
    times = [time for index in range(steps) for time in (100 + 0.02 * index, 100.001 + 0.02 * index)]
    read = [answered(rank, index) for index in range(steps) for rank in range(2)]
    return TimelineEnd(
        1,
        reason,
        mesh=Mesh(data=2),
        clock="here",
        steps_i64=array("q", facts).tobytes(),
        times_f64=array("d", times).tobytes(),
        answered_f64=array("d", read).tobytes(),
        num_dropped=0,
    )


def traced(end: TimelineEnd, spans: list[StepSpans]) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(chrome_trace(end, spans, HOSTS))
    check_trace(document)
    return document


def test_plans_and_steps_have_their_places() -> None:
    end = end_of(2, lambda rank, index: 100.013 + 0.02 * index)
    spans = [
        step_spans(rank, 7 + index, 100.002 + 0.02 * index, "here") for index in range(2) for rank in range(2)
    ]
    document = traced(end, spans)
    assert [event["name"] for event in spans_of(document, 0, 0)] == ["plan 7", "plan 8"]
    for rank in range(2):
        assert [event["name"] for event in spans_of(document, rank + 1, Track.STEP)] == [
            "step 7",
            "forward",
            "step 8",
            "forward",
        ]
        second = spans_of(document, rank + 1, Track.SECOND)
        assert [event["name"] for event in second] == ["attention", "tensor wait"] * 2
        assert second[0]["args"] == {"step": 7, "layer": 3}
        assert second[0]["ts"] == pytest.approx(4000) and second[0]["dur"] == pytest.approx(3000)
    names = {event["args"]["name"] for event in document["traceEvents"] if event["name"] == "process_name"}
    assert names == {
        "controller",
        "rank 0 on near, stage 0, data 0, tensor 0",
        "rank 1 on far, stage 0, data 1, tensor 0",
    }
    flights = [event for event in document["traceEvents"] if event["ph"] in "be"]
    assert [(event["ph"], event["id"]) for event in flights] == [("b", 7), ("e", 7), ("b", 8), ("e", 8)]
    assert document["otherData"]["reason"] == "" and document["otherData"]["steps"] == 2


def test_the_clock_of_another_host_is_bound_by_plans_and_results() -> None:
    """Rank 1's clock is 5,000 s ahead; the first step waits 1 ms for its plan, and its result 3 ms
    for the controller.
    """
    end = end_of(2, lambda rank, index: 100.015 + 0.02 * index)
    spans = [
        step_spans(rank, 7 + index, 100.002 + 0.02 * index, "there" if rank else "here", 5000.0 * rank)
        for index in range(2)
        for rank in range(2)
    ]
    document = traced(end, spans)
    near, far = document["otherData"]["ranks"]
    assert (near["clock_ahead_seconds"], near["uncertainty_seconds"]) == (0.0, 0.0)
    assert far["uncertainty_seconds"] == pytest.approx(0.002, abs=1e-9)
    assert far["clock_ahead_seconds"] == pytest.approx(5000.0 - 0.001, abs=1e-6)
    first, second = (spans_of(document, rank + 1, Track.STEP)[0]["ts"] for rank in range(2))
    assert abs(second - first) <= 1e6 * far["uncertainty_seconds"]


def test_a_partial_timeline_says_why_and_how_far_it_is_bound() -> None:
    end = end_of(1, lambda rank, index: math.nan if rank else 100.013, "epoch 5 began")
    document = traced(end, [step_spans(0, 7, 100.002, "here"), step_spans(1, 7, 300.0, "there")])
    assert document["otherData"]["reason"] == "epoch 5 began"
    assert document["otherData"]["ranks"][1]["uncertainty_seconds"] is None
    assert len(spans_of(document, 2, Track.SECOND)) == 2


def test_there_may_be_plans_alone_or_ranks_alone_or_nothing() -> None:
    assert len(spans_of(traced(end_of(3, lambda rank, index: math.nan), []), 0, 0)) == 3
    alone = traced(TimelineEnd(1, "the controller is gone"), [step_spans(5, 7, 1e6, "there")])
    assert spans_of(alone, 6, Track.STEP)[0]["ts"] == 0
    assert traced(TimelineEnd(1, "0 of 64 steps"), [])["otherData"]["steps"] == 0
