"""The parts of ``launch load``: prompts, events, durations, records, display."""

from __future__ import annotations

import io
import json
import socket
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, strategies as st
from rich.console import Console
from typer.testing import CliRunner, Result

from lockstep.launch.client import status_line
from lockstep.launch.client.load_record import GapCounts, LoadRecord
from lockstep.launch.client.load_screen import LoadProgress, show_load
from lockstep.launch.client.traffic import EventReader, prompt_ids
from lockstep.launch.commands.main import app
from lockstep.launch.simulation.evaluate import quantiles
from lockstep.launch.simulation.trace import Trace, TraceRequest

ONE = "poisson:rate=1,input=4,output=2,count=1"


def load(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["load", *arguments])


def test_prompts_share_the_blocks_that_the_trace_names_and_nothing_else() -> None:
    """With the 1,024 tokens of a small vocabulary, too."""
    requests = (TraceRequest(0.0, 96, 1, (1, 2, 3)), TraceRequest(0.0, 96, 1, (1, 2, 4)))
    requests += tuple(TraceRequest(0.0, 96, 1) for _ in range(200))
    made = [prompt_ids(Trace("made", requests, 32), number, 1024) for number in range(len(requests))]
    assert {len(prompt) for prompt in made} == {96}
    assert made[0][:64] == made[1][:64]
    blocks = {tuple(prompt[start : start + 32]) for prompt in made for start in (0, 32, 64)}
    assert len(blocks) == 3 * len(made) - 2
    counts = np.bincount(np.concatenate(made), minlength=1024)
    assert len(counts) == 1024
    assert counts.max() < 5 * counts.mean()


EVENTS = (
    b'data: {"choices": [{"token_ids": [1, 2], "prompt_token_ids": [9]}]}\n\n: a comment\n\n'
    b'data: {"choices": [{"text": "\\u00e4", "token_ids": [3], "finish_reason": "length"}]}\r\n\r\n'
    b'data: {"choices": [], "usage": {"prompt_tokens": 7, "prompt_tokens_details": {"cached_tokens": 4}}}\n\n'
    b"data: [DONE]\n\n"
)


@given(st.lists(st.integers(0, len(EVENTS)), max_size=12))
def test_events_are_the_same_in_any_pieces(cuts: list[int]) -> None:
    reader = EventReader()
    places = [0, *sorted(cuts), len(EVENTS)]
    events = [event for start, end in pairwise(places) for event in reader.feed(EVENTS[start:end])]
    assert [event.num_tokens for event in events] == [2, 1, 0]
    assert events[2].usage is not None
    assert (events[2].usage.prompt_tokens, events[2].usage.cached) == (7, 4)
    assert reader.done


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=200))
def test_counted_durations_are_within_half_a_per_cent(values: list[float]) -> None:
    gaps = GapCounts()
    for value in values:
        gaps.add(value, 1)
    exact, counted = quantiles(values), gaps.spread()
    for name in ("p50", "p90", "p99"):
        assert getattr(counted, name) == pytest.approx(getattr(exact, name), rel=0.005)


def recorded() -> LoadRecord:
    record = LoadRecord("made", 4)
    for due in (0.0, 1.0, 2.0):
        record.begin(due, due + 0.25)
    record.first(0.0, 0.5, 10)
    record.tokens(0.5, 1)
    record.gaps.add(0.1, 4)
    record.tokens(0.9, 4)
    record.finish(10.0, 10, 5)
    record.fail("HTTP 503", "queue [full]")
    return record


def test_a_record_counts_what_happened() -> None:
    report = recorded().report(complete=False)
    assert (report.sent, report.finished, report.failed, report.open) == (3, 1, 1, 1)
    assert (report.seconds, report.output_tokens) == (0.9, 5)
    assert report.output_per_second == pytest.approx(5 / 0.9)
    assert (report.time_to_first_token.p50, report.lateness.p99) == (0.5, 0.25)
    assert report.time_between_tokens.p50 == pytest.approx(0.1, rel=0.005)
    assert report.errors == {"HTTP 503": 1}


def test_the_table_shows_errors_by_kind() -> None:
    text, record = io.StringIO(), recorded()
    show_load(record.report(complete=False), None, record.examples, Console(file=text, width=120))
    shown = text.getvalue()
    assert "stopped early" in shown
    assert "1 failed, HTTP 503: queue [full]" in shown
    assert "simulated" not in shown


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    text, moment = io.StringIO(), iter([0.0, 5.0, 10.0, 10.0, 12.0])
    monkeypatch.setattr(status_line.time, "monotonic", lambda: next(moment))
    progress = LoadProgress(Console(file=text, width=200))
    for seconds in (5.0, 10.0, 12.0):
        progress.show(recorded(), seconds)
    progress.hide()
    line = "10.0 s: 3 of 4 requests sent, 1 open, 1 finished, 1 failed, 5 tokens\n"
    assert text.getvalue() == line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trace", "/no/such"], "--trace /no/such: cannot be read"),
        (["--trace", "poisson:rate=0,input=1,output=1,count=1"], "rate = 0: should be a number"),
        (["--trace", ONE, "parallel.tensor=2"], "parallel.tensor=2: overrides a recipe; --recipe names none"),
        (["--trace", ONE, "--recipe", "no-such"], "no-such"),
        (["--trace", ONE, "--recipe", "demo", "kv_cache.memory=4KiB"], "kv_cache.memory"),
        (["--trace", ONE, "--api-key-env", "NOT_SET_ANYWHERE"], "--api-key-env NOT_SET_ANYWHERE: not set"),
    ],
)
def test_bad_input_is_refused_before_the_server_is_asked(arguments: list[str], message: str) -> None:
    result = load("--against", "http://127.0.0.1:9", *arguments)
    assert (result.exit_code, message in result.stderr) == (2, True), result.output


def test_a_server_that_is_not_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    result = load("--against", f"http://127.0.0.1:{port}", "--trace", ONE)
    assert result.exit_code == 3
    assert json.dumps(port) in result.stderr
