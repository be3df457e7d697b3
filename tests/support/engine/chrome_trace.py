"""Checks of documents in Chrome's trace event format."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

Event = dict[str, Any]

_ROUNDING = 0.002  # microseconds: begin and length are rounded to nanoseconds


def check_trace(document: dict[str, Any]) -> None:
    """Every event has what its phase asks for; spans of a track lie inside of one another or apart;
    every process and track has a name.
    """
    assert set(document) == {"displayTimeUnit", "otherData", "traceEvents"}
    assert document["displayTimeUnit"] in ("ms", "ns")
    named: set[tuple[int, int]] = set()
    tracks: dict[tuple[int, int], list[Event]] = defaultdict(list)
    open_flights: set[int] = set()
    for event in document["traceEvents"]:
        assert {"name", "ph", "pid", "tid", "ts"} <= set(event), event
        assert math.isfinite(event["ts"]) and event["ts"] >= 0, event
        place = event["pid"], event["tid"]
        if event["ph"] == "M":
            named.add(place)
        elif event["ph"] == "X":
            assert event["dur"] >= 0, event
            tracks[place].append(event)
        elif event["ph"] == "b":
            open_flights.add(event["id"])
        else:
            assert event["ph"] == "e" and event["id"] in open_flights, event
    assert set(tracks) <= named
    for place, events in tracks.items():
        _check_nesting(place, events)


def spans_of(document: dict[str, Any], process: int, track: int) -> list[Event]:
    """The spans of a track, in the order of their begins, outer ones first."""
    found = [
        event
        for event in document["traceEvents"]
        if event["ph"] == "X" and (event["pid"], event["tid"]) == (process, track)
    ]
    return sorted(found, key=lambda event: (event["ts"], -event["dur"]))


def _check_nesting(place: tuple[int, int], events: list[Event]) -> None:
    outer: list[Event] = []
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        while outer and _end(outer[-1]) <= event["ts"] + _ROUNDING:
            outer.pop()
        assert not outer or _end(event) <= _end(outer[-1]) + _ROUNDING, (place, outer[-1], event)
        outer.append(event)


def _end(event: Event) -> float:
    return float(event["ts"] + event["dur"])
