"""Notes of a step: which span ends where, by microbatch; and those of real ranks."""

from __future__ import annotations

import json
from array import array
from itertools import pairwise
from pathlib import Path

import pytest
from torch import nn

from lockstep.engine.protocol.plan import Header, Mode
from lockstep.engine.protocol.timeline import Span, StepSpans, TimelineEnd, Track
from lockstep.engine.rank import span_notes
from lockstep.engine.rank.span_notes import SpanNotes
from lockstep.engine.tracing.timeline import chrome_trace
from lockstep.moe.clock import HostClock
from lockstep.moe.phases import COMBINE, DISPATCH, EXPERT
from lockstep.parallel.microbatches import Turns
from lockstep.parallel.rank_groups import RankGroups
from support.engine.chrome_trace import check_trace
from support.engine.rank.greedy_prompts import write_family
from support.engine.rank.overlapped_steps import FAMILY, spans_of_steps
from support.parallel.gloo_ranks import run_ranks

Row = tuple[str, int, int, float, float]


def rows_of(spans: StepSpans) -> list[Row]:
    """Kind, track, layer, begin and end of each span."""
    kinds, times = array("i", spans.kinds_i32), array("d", spans.times_f64)
    return [
        (Span(kinds[3 * n]).title, kinds[3 * n + 1], kinds[3 * n + 2], times[2 * n], times[2 * n + 1])
        for n in range(spans.num_spans)
    ]


class Clocked:
    """Notes on a clock that the test moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.turns = Turns()
        self.notes = SpanNotes(HostClock(self.time), self.turns, self.time)

    def time(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds

    def exchange(self, wait: float) -> None:
        """The calls of a dispatcher in a layer: 1 s to send, 2 s of shared experts, ``wait`` and 1
        s to receive, 4 s of experts, 1 s to send back, ``wait`` and 1 s to combine.
        """
        notes = self.notes
        notes.mark()
        self.passes(1)
        notes.lap(DISPATCH)
        self.passes(2)
        for phase in (DISPATCH, COMBINE):
            self.turns.give()
            notes.mark()
            begin = self.now
            self.passes(wait)
            notes._waited("experts", begin, self.now)
            self.passes(1)
            notes.lap(phase)
            if phase == DISPATCH:
                self.passes(4)
                notes.lap(EXPERT)
                self.passes(1)
                notes.lap(COMBINE)

    def layer(self, wait: float) -> None:
        """3 s of attention with a second's wait for the tensor group, a second's gate, an
        exchange.
        """
        self.notes._enter(7)()
        self.notes._attend()
        self.passes(2)
        self.notes._waited("layers", self.now - 1, self.now)
        self.passes(1)
        self.notes._attended()
        self.passes(1)
        self.exchange(wait)

    def spans(self, microbatches: int, wait: float) -> list[Row]:
        header = Header(0, 0, 5, 4, Mode.DECODE, 8, microbatches)

        def forward(header: Header) -> None:
            begin = self.now
            self.passes(1)
            self.notes._waited("stages", begin, self.now)
            if header.microbatches == 1:
                self.layer(wait)
            else:
                self.turns.run(lambda: self.layer(wait), lambda: self.layer(wait))

        with self.notes.watching(RankGroups(), nn.ModuleDict()):
            self.notes.forward(forward, header)
        self.passes(0.5)
        return rows_of(self.notes.end(0, header))


def test_spans_of_a_whole_step() -> None:
    rows = Clocked().spans(1, wait=3)
    assert [row for row in rows if row[1] == Track.STEP] == [
        ("apply", 0, -1, 0, 0),
        ("stage wait", 0, -1, 0, 1),
        ("forward", 0, -1, 0, 21),
        ("sample", 0, -1, 21, 21.5),
    ]
    assert [row[:1] + row[2:] for row in rows if row[1] == Track.FIRST] == [
        ("tensor wait", 7, 2, 3),
        ("attention", 7, 1, 4),
        ("gate", 7, 4, 5),
        ("dispatch", 7, 5, 6),
        ("shared experts", 7, 6, 8),
        ("dispatch wait", 7, 8, 11),
        ("dispatch", 7, 8, 12),
        ("experts", 7, 12, 16),
        ("combine", 7, 16, 17),
        ("combine wait", 7, 17, 20),
        ("combine", 7, 17, 21),
    ]


@pytest.mark.parametrize("role", ["dense", "layers"])
def test_a_block_that_gave_its_turn_away_goes_on_after_its_wait(role: str) -> None:
    """Each of two microbatches computes 1 s, gives its turn away, waits 2 s and computes 3 s."""
    clocked = Clocked()
    notes, turns = clocked.notes, clocked.turns

    def block() -> None:
        notes._enter(3)()
        clocked.passes(1)
        turns.give()
        begin = clocked.now
        clocked.passes(2)
        notes._waited(role, begin, clocked.now)
        clocked.passes(3)
        notes._enter(4)()

    header = Header(0, 0, 5, 4, Mode.DECODE, 8, 2)
    with notes.watching(RankGroups(), nn.ModuleDict()):
        notes.forward(lambda header: turns.run(block, block), header)
    rows = [row for row in rows_of(notes.end(0, header)) if row[1] == Track.FIRST]
    assert [row[:1] + row[2:] for row in rows] == [
        ("other", 3, 0, 1),
        ("tensor wait", 3, 2, 4),
        ("other", 3, 4, 7),
    ]


def test_two_microbatches_have_tracks_of_their_own() -> None:
    rows = Clocked().spans(2, wait=0)
    by_track = {track: [row for row in rows if row[1] == track] for track in Track}
    first, second = by_track[Track.FIRST], by_track[Track.SECOND]
    assert [row[0] for row in first] == [row[0] for row in second]
    assert {"attention", "dispatch", "shared experts", "experts", "combine", "tensor wait"} <= {
        row[0] for row in first
    }
    outer = sorted((row for row in first + second if "wait" not in row[0]), key=lambda row: row[3:])
    for one, another in pairwise(outer):
        assert one[4] <= another[3], "one thread computes one thing at a time"
    [attention] = [row for row in second if row[0] == "attention"]
    [sent, _] = [row for row in first if row[0] == "dispatch"]
    assert attention[3] > sent[4], "the second microbatch begins where the first gives its turn away"


def test_a_step_has_so_many_spans_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(span_notes, "MOST_PER_STEP", 5)
    clocked = Clocked()
    header = Header(0, 0, 5, 4, Mode.DECODE, 8)
    with clocked.notes.watching(RankGroups(), nn.ModuleDict()):
        clocked.notes.forward(lambda header: clocked.layer(1), header)
    spans = clocked.notes.end(0, header)
    assert spans.num_spans == 5 and spans.num_dropped == 9


@pytest.mark.parametrize("microbatches", [1, 2])
def test_spans_of_ranks(microbatches: int, tmp_path: Path) -> None:
    """Every layer and phase is there on every rank; tokens are as without notes; a plan that does
    not ask leaves none.
    """
    by_rank = run_ranks(spans_of_steps, 2, write_family(tmp_path / "model", FAMILY), microbatches)
    spans = [each for found, _ in by_rank for each in found]
    assert len(spans) == 2 * 3 and {(each.rank, each.step) for each in spans} == {
        (rank, step) for rank in range(2) for step in (1, 3, 5)
    }
    for tokens, plain in (outcome for _, outcome in by_rank):
        assert tokens == plain
    for each in spans:
        rows = rows_of(each)
        layers = {row[2] for row in rows if row[0] == "attention"}
        assert layers == set(range(len(layers))) and len(layers) > 1
        tracks = range(1, 1 + microbatches)
        for name in ("attention", "gate", "dispatch", "experts", "combine", "dispatch wait", "combine wait"):
            found = {(row[1], row[2]) for row in rows if row[0] == name}
            assert found == {(track, layer) for track in tracks for layer in layers}, name
        assert [row[0] for row in rows if row[1] == Track.STEP] == ["apply", "forward", "sample"]
        assert each.begun <= min(row[3] for row in rows) and max(row[4] for row in rows) <= each.ended
    check_trace(json.loads(chrome_trace(TimelineEnd(1, ""), spans, {})))
