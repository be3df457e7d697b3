"""The timeline of steps as a document in Chrome's trace event format, which Perfetto shows too.

The controller is one process of the trace, each rank another: a rank has a track for its steps and
one for each microbatch, and spans of a track lie inside of one another or apart.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from ..protocol.timeline import Span, StepSpans, TimelineEnd, Track

Event = dict[str, Any]

_TRACKS = {Track.STEP: "steps", Track.FIRST: "microbatch 0", Track.SECOND: "microbatch 1"}
_CONTROLLER = 0  # as a process of the trace; rank n is process n + 1


@dataclass(frozen=True)
class ClockOffset:
    """Seconds by which a clock is ahead of the controller's, and by how much that may be wrong;
    None where nothing is known.
    """

    ahead: float
    uncertainty: float | None


@dataclass(frozen=True)
class _Step:
    epoch: int
    step: int
    microbatches: int
    capacity: int
    tokens: int
    began: float
    sent: float
    answered: Sequence[float]


def chrome_trace(end: TimelineEnd, spans: Sequence[StepSpans], hosts: Mapping[int, str]) -> bytes:
    """The JSON document. ``hosts``: of the ranks."""
    steps = _steps(end)
    offsets = clock_offsets(end.clock, {step.step: step for step in steps}, spans)
    starts = [step.began for step in steps]
    starts += [each.begun - offsets[each.clock].ahead for each in spans]
    start = min(starts, default=0.0)
    parts = [
        _encoded(_names(end, spans, hosts)),
        _encoded(event for step in steps for event in _plan_events(step, start)),
        *(_encoded(_rank_events(each, start + offsets[each.clock].ahead)) for each in spans),
    ]
    told = {
        "reason": end.reason,
        "steps": len(steps),
        "dropped_spans": end.num_dropped + sum(each.num_dropped for each in spans),
        "clocks": "Times are those of hosts; a GPU works later than the host that asks it. A step is"
        " bound to a clock by four times: plan sent, step begun, result made, result read.",
        "ranks": [
            {
                "rank": rank,
                "host": hosts.get(rank, ""),
                "clock_ahead_seconds": offsets[clock].ahead,
                "uncertainty_seconds": offsets[clock].uncertainty,
            }
            for rank, clock in sorted({each.rank: each.clock for each in spans}.items())
        ],
    }
    events = b",".join(part for part in parts if part)
    return b'{"displayTimeUnit":"ms","otherData":%b,"traceEvents":[%b]}' % (msgspec.json.encode(told), events)


def clock_offsets(own: str, steps: Mapping[int, _Step], spans: Iterable[StepSpans]) -> dict[str, ClockOffset]:
    """The offset of every clock to ``own``, the controller's.

    A rank begins a step after its plan was sent, and has its result before that is read; so each
    step bounds the offset from both sides, and the middle of the narrowest bounds is taken.
    """
    bounds: dict[str, tuple[float, float]] = {}
    for each in spans:
        low, high = bounds.get(each.clock, (-math.inf, math.inf))
        step = steps.get(each.step)
        if step is not None:
            high = min(high, each.begun - step.sent)
            read = step.answered[each.rank]
            low = low if math.isnan(read) else max(low, each.ended - read)
        bounds[each.clock] = low, high
    offsets = {}
    for clock, (low, high) in bounds.items():
        if clock and clock == own:
            offsets[clock] = ClockOffset(0.0, 0.0)
        elif math.isinf(low) or math.isinf(high):
            known = [bound for bound in (low, high) if math.isfinite(bound)]
            offsets[clock] = ClockOffset(known[0] if known else 0.0, None)
        else:
            offsets[clock] = ClockOffset((low + high) / 2, abs(high - low) / 2)
    return offsets


def _steps(end: TimelineEnd) -> list[_Step]:
    facts = array("q", end.steps_i64)
    times = array("d", end.times_f64)
    read = array("d", end.answered_f64)
    world, steps = end.mesh.world, []
    for number in range(len(facts) // 5):
        epoch, step, microbatches, capacity, tokens = facts[5 * number : 5 * number + 5]
        began, sent = times[2 * number : 2 * number + 2]
        answered = read[world * number : world * (number + 1)]
        steps.append(_Step(epoch, step, microbatches, capacity, tokens, began, sent, answered))
    return steps


def _names(end: TimelineEnd, spans: Sequence[StepSpans], hosts: Mapping[int, str]) -> Iterator[Event]:
    """Names of processes and tracks."""
    yield _meta("process_name", _CONTROLLER, 0, name="controller")
    yield _meta("thread_name", _CONTROLLER, 0, name="plans")
    for rank in sorted({each.rank for each in spans}):
        place = end.mesh.coordinates(rank) if rank < end.mesh.world else None
        where = f", stage {place.stage}, data {place.data}, tensor {place.tensor}" if place else ""
        yield _meta("process_name", rank + 1, 0, name=f"rank {rank} on {hosts.get(rank, '?')}{where}")
        yield _meta("process_sort_index", rank + 1, 0, sort_index=rank + 1)
        for track, title in _TRACKS.items():
            yield _meta("thread_name", rank + 1, track, name=title)


def _meta(kind: str, process: int, track: int, **told: object) -> Event:
    return {"name": kind, "ph": "M", "pid": process, "tid": track, "ts": 0, "args": told}


def _plan_events(step: _Step, start: float) -> Iterator[Event]:
    """A plan, and the time until all its results are read."""
    facts = {name: getattr(step, name) for name in ("epoch", "step", "microbatches", "capacity", "tokens")}
    yield _span(f"plan {step.step}", (_CONTROLLER, 0), (step.began - start, step.sent - start), facts)
    read = [time for time in step.answered if not math.isnan(time)]
    flight = {"name": "in flight", "cat": "in flight", "id": step.step, "pid": _CONTROLLER, "tid": 0}
    if read:
        yield flight | {"ph": "b", "ts": _micro(step.sent - start), "args": facts}
        yield flight | {"ph": "e", "ts": _micro(max(read) - start)}


def _rank_events(spans: StepSpans, start: float) -> Iterator[Event]:
    """Spans of a rank in one step, outer ones before those inside. ``start``: of the trace, by the
    rank's clock.
    """
    process, step = spans.rank + 1, {"step": spans.step, "epoch": spans.epoch}
    yield _span(f"step {spans.step}", (process, 0), (spans.begun - start, spans.ended - start), step)
    kinds = array("i", spans.kinds_i32)
    times = array("d", spans.times_f64)
    rows = zip(*[iter(kinds)] * 3, *[iter(times)] * 2, strict=True)
    for kind, track, layer, begin, end in sorted(rows, key=lambda row: (row[1], row[3], -row[4])):
        facts = {"step": spans.step} | ({"layer": layer} if layer >= 0 else {})
        yield _span(Span(kind).title, (process, track), (begin - start, end - start), facts)


def _span(name: str, place: tuple[int, int], times: tuple[float, float], told: Event) -> Event:
    begin, end = (_micro(time) for time in times)
    where = {"pid": place[0], "tid": place[1], "ts": begin, "dur": round(end - begin, 3)}
    return {"name": name, "ph": "X", **where, "args": told}


def _micro(seconds: float) -> float:
    """Microseconds, to a nanosecond."""
    return round(1e6 * seconds, 3)


def _encoded(events: Iterable[Event]) -> bytes:
    """Events without the brackets around them. A few thousand at once: others want the interpreter
    meanwhile.
    """
    return msgspec.json.encode(list(events))[1:-1]
