"""``Bench`` against doubles on real sockets: turns, load, what is sent, what fails."""

from __future__ import annotations

import asyncio

import pytest

from lockstep.launch.bench.endpoint import Endpoint, find
from lockstep.launch.bench.figures import Round, figures_of
from lockstep.launch.bench.run import Bench
from lockstep.launch.bench.turn import TurnProgress
from lockstep.launch.bench.workload import OfferedLoad, Workload
from lockstep.launch.client.server import ServerError, server_at
from support.launch.scripted_endpoint import ScriptedEndpoint, scripted_endpoint

TWO = OfferedLoad(4, concurrency=2)


def workload(*loads: OfferedLoad, rounds: int = 1, shared: int = 0, seed: int = 0) -> Workload:
    return Workload(loads, 8, 6, shared, rounds, seed)


async def endpoint_at(double: ScriptedEndpoint) -> Endpoint:
    return await find(server_at(double.url, 10.0, double.key), None)


def run(asked: Workload, *doubles: ScriptedEndpoint) -> tuple[Bench, list[str]]:
    """A benchmark, and the titles of its rounds in order."""
    titles = []

    def tell(progress: TurnProgress, found: Round) -> None:
        titles.append(progress.title)

    async def measure() -> Bench:
        async with asyncio.timeout(60.0):
            endpoints = [await endpoint_at(double) for double in doubles]
            made = Bench(endpoints, asked, 100, tell=tell)
            await made.run(asyncio.Event())
            return made

    return asyncio.run(measure()), titles


def test_a_request_says_all_that_makes_answers_comparable() -> None:
    with scripted_endpoint() as double:
        made, _ = run(workload(TWO), double)
    warm_up, measured = double.bodies[:2], double.bodies[2:]
    assert [body["max_tokens"] for body in warm_up] == [4, 4]
    assert [body["max_tokens"] for body in measured] == [6] * 4
    body = measured[0]
    assert (body["model"], body["temperature"], body["ignore_eos"], body["stream"]) == (
        "scripted",
        0.0,
        True,
        True,
    )
    assert body["stream_options"] == {"include_usage": True}
    assert {len(each["prompt"]) for each in double.bodies} == {8}
    assert len({tuple(each["prompt"]) for each in double.bodies}) == 6, "no prompt is sent twice"
    assert len({each["cache_salt"] for each in double.bodies}) == 1
    figures = figures_of(made.rounds[TWO, 0], 6)
    assert (figures.finished, figures.short, figures.without_usage) == (4, 0, 0)
    assert figures.output_tokens == 24


def test_two_runs_ask_the_same_prompts_under_other_salts() -> None:
    with scripted_endpoint() as first, scripted_endpoint() as second, scripted_endpoint() as third:
        for double, seed in ((first, 0), (second, 0), (third, 1)):
            run(workload(OfferedLoad(3, concurrency=1), seed=seed), double)
    prompts = [[body["prompt"] for body in double.bodies] for double in (first, second, third)]
    assert prompts[0] == prompts[1] != prompts[2]
    assert first.bodies[0]["cache_salt"] != second.bodies[0]["cache_salt"]


def test_endpoints_take_turns_and_the_lead() -> None:
    with scripted_endpoint() as ours, scripted_endpoint() as theirs:
        made, titles = run(workload(TWO, rounds=3), ours, theirs)
    order = ["a" if title.endswith(ours.url) else "b" for title in titles]
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert titles[0] == f"concurrency 2, round 1 of 3, {ours.url}"
    assert [len(made.rounds[TWO, place]) for place in (0, 1)] == [3, 3]


def test_one_server_under_both_names_is_asked_different_prompts() -> None:
    with scripted_endpoint() as double:
        made, _ = run(workload(TWO), double, double)
    assert [len(made.rounds[TWO, place]) for place in (0, 1)] == [1, 1]
    assert len({tuple(body["prompt"]) for body in double.bodies}) == len(double.bodies) == 12


def test_so_many_requests_are_in_flight_and_no_more() -> None:
    """The double begins streams in threes."""
    with scripted_endpoint(together=3) as double:
        made, _ = run(workload(OfferedLoad(9, concurrency=3)), double)
    assert double.peak == 3
    [[found]] = made.rounds.values()
    assert len(found.finished) == 9


def test_with_a_rate_requests_leave_though_none_is_answered() -> None:
    """The double begins no stream before all have come."""
    load = OfferedLoad(8, rate=200.0)
    with scripted_endpoint(together=8) as double:
        made, _ = run(workload(load), double)
    assert double.peak == 8
    [found] = made.rounds[load, 0]
    due = sorted(request.due for request in found.requests)
    assert due[0] == 0.0 and len(set(due)) == 8
    assert all(request.sent >= request.due for request in found.requests)


def test_without_usage_tokens_are_counted_by_chunks() -> None:
    with scripted_endpoint(usage=False) as double:
        made, _ = run(workload(TWO), double)
    figures = figures_of(made.rounds[TWO, 0], 6)
    assert (figures.output_tokens, figures.without_usage) == (24, 4)


def test_failures_are_counted_and_end_nothing() -> None:
    """Two requests of the warm-up, then the second and third of the round."""
    with scripted_endpoint(refusals={4: 503, 5: 400}) as double:
        made, _ = run(workload(TWO, rounds=2), double)
    figures = figures_of(made.rounds[TWO, 0], 6)
    assert (figures.asked, figures.finished, made.broken) == (8, 6, "")
    assert figures.errors == {"HTTP 503": 1, "HTTP 400": 1}
    assert "refused 4" in figures.examples["HTTP 503"]


def test_a_refused_warm_up_ends_the_run() -> None:
    with scripted_endpoint(refusals={1: 400}) as double, pytest.raises(ServerError, match="refused 1"):
        run(workload(TWO), double)
    assert len(double.bodies) == 2


def test_a_warm_up_that_is_refused_later_keeps_what_was_measured() -> None:
    """Behind two requests and four of the first level."""
    other = OfferedLoad(4, concurrency=1)
    with scripted_endpoint(refusals={7: 400}) as double:
        made, _ = run(workload(TWO, other), double)
    assert list(made.rounds) == [(TWO, 0)]
    assert "refused 7" in made.broken


def test_a_busy_server_in_the_warm_up_ends_nothing() -> None:
    with scripted_endpoint(refusals={1: 503}) as double:
        made, _ = run(workload(TWO), double)
    assert not made.broken


def test_a_server_that_dies_in_the_middle() -> None:
    """In the fourth of six requests, one at a time, behind one of the warm-up."""
    load = OfferedLoad(6, concurrency=1)
    with scripted_endpoint(dies_at=5) as double:
        made, _ = run(workload(load, rounds=3), double)
    assert [len(found.finished) for found in made.rounds[load, 0]] == [3, 0]
    assert made.broken == f"{double.url} answered no request of a round"
    figures = figures_of(made.rounds[load, 0], 6)
    assert (figures.asked, figures.finished) == (12, 3)
    assert sum(figures.errors.values()) == 9
    assert set(figures.errors) <= {"no connection", "cut off"}


def test_a_stopped_run_keeps_its_whole_rounds() -> None:
    with scripted_endpoint() as double:

        async def measure() -> tuple[Bench, bool]:
            stop = asyncio.Event()

            def tell(progress: TurnProgress, found: Round) -> None:
                stop.set()

            made = Bench([await endpoint_at(double)], workload(TWO, rounds=1000), 100, tell=tell)
            async with asyncio.timeout(60.0):
                return made, await made.run(stop)

        made, complete = asyncio.run(measure())
    assert (complete, made.broken) == (False, "as asked; the round under way is not counted")
    assert 1 <= len(made.rounds[TWO, 0]) < 1000


def test_an_endpoint_is_found_with_what_it_tells() -> None:
    with scripted_endpoint(vocab=None, max_len=None) as silent, scripted_endpoint() as open_hearted:
        found = asyncio.run(endpoint_at(silent))
        told = asyncio.run(endpoint_at(open_hearted))
    assert (found.vocab_size, found.max_len, found.version, found.model) == (
        None,
        None,
        "unknown",
        "scripted",
    )
    assert (told.vocab_size, told.max_len) == (100, 4096)
