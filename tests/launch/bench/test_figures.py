"""Times, percentiles, rates and ratios of hand-made streams."""

from __future__ import annotations

import pytest

from lockstep.launch.bench.figures import Round, figures_of, percentiles, ratios
from lockstep.launch.bench.timing import Failure, TimedRequest
from lockstep.launch.client.server import ServerError
from lockstep.launch.simulation.report import Spread

# Sent at 1.0, first chunk after 0.5, then gaps of 0.1, 0.1 and 0.4 with 7 tokens in all.
SLOW = TimedRequest(1.0, 1.0, (1.5, 1.6, 1.7, 2.1), tokens=7, usage=True, cached=3)
# Due at 1.0, sent at 1.25, one token after 0.25.
SINGLE = TimedRequest(1.0, 1.25, (1.5,), tokens=1, usage=True)
CUT = TimedRequest(1.0, 1.5, (2.0, 2.5), tokens=2, failure=Failure(ServerError("cut off", "gone"), 3.0))


def test_times_of_a_request() -> None:
    assert SLOW.ttft == pytest.approx(0.5)
    assert SLOW.latency == pytest.approx(1.1)
    assert SLOW.itl == pytest.approx([0.1, 0.1, 0.4])
    assert SLOW.tpot == pytest.approx(0.6 / 6), "(latency - TTFT) / (output tokens - 1)"
    assert SLOW.end == 2.1


def test_a_single_token_has_no_time_between_tokens() -> None:
    assert (SINGLE.tpot, SINGLE.itl) == (None, [])
    figures = figures_of([Round((SINGLE,))], 1)
    assert figures.tpot == figures.itl == Spread(None, None, None)
    assert figures.ttft.p99 == pytest.approx(0.25)


def test_percentiles_lie_between_values() -> None:
    assert percentiles([4.0, 1.0, 3.0, 2.0, 5.0]) == Spread(3.0, pytest.approx(4.6), pytest.approx(4.96))
    assert percentiles([2.0, 1.0]).p50 == 1.5
    assert percentiles([]) == Spread(None, None, None)


def test_rates_of_a_round_count_finished_answers_only() -> None:
    """From 1.0, the first sent, to 3.0, the failure."""
    found = Round((SLOW, SINGLE, CUT))
    assert found.seconds == 2.0
    assert found.output_per_second == pytest.approx(8 / 2)
    assert found.requests_per_second == pytest.approx(2 / 2)
    assert found.in_flight == pytest.approx((1.1 + 0.25 + 1.5) / 2)


def test_figures_pool_requests_and_take_medians_of_rates() -> None:
    quick = Round((TimedRequest(0.0, 0.0, (0.5, 1.0), tokens=2, usage=True),))  # 2 tokens/s
    slower = Round((TimedRequest(0.0, 0.0, (1.0, 2.0), tokens=2, usage=True),))  # 1 token/s
    slowest = Round((TimedRequest(0.0, 0.0, (2.0, 8.0), tokens=2, usage=True),))  # 0.25 tokens/s
    figures = figures_of([quick, slowest, slower], 2)
    assert (figures.rounds, figures.asked, figures.finished, figures.failed) == (3, 3, 3, 0)
    assert figures.output_per_second == 1.0
    assert figures.requests_per_second == 0.5
    assert (figures.ttft.p50, figures.latency.p50, figures.tpot.p50) == (1.0, 2.0, 1.0)
    assert (figures.seconds, figures.output_tokens) == (11.0, 6)


def test_failures_are_counted_by_kind_and_their_times_left_out() -> None:
    other = TimedRequest(0.0, 0.0, (), failure=Failure(ServerError("HTTP 503", "full"), 0.5))
    figures = figures_of([Round((SLOW, CUT, other, CUT))], 8)
    assert (figures.finished, figures.failed) == (1, 3)
    assert figures.errors == {"cut off": 2, "HTTP 503": 1}
    assert figures.examples == {"cut off": "gone", "HTTP 503": "full"}
    assert figures.ttft == Spread(0.5, 0.5, 0.5)
    assert (figures.short, figures.cached_tokens) == (1, 3)


def test_a_level_without_any_answer_has_no_times() -> None:
    figures = figures_of([Round((CUT,))], 8)
    assert (figures.output_per_second, figures.ttft.p50) == (0.0, None)
    whole = figures_of([Round((SLOW,))], 7)
    assert ratios(figures, whole).output_per_second == 0.0
    assert ratios(whole, figures).output_per_second is None
    assert ratios(whole, figures).ttft is None


def test_ratios_are_of_medians() -> None:
    ours = figures_of([Round((SLOW,))], 7)
    theirs = figures_of([Round((TimedRequest(0.0, 0.0, (0.25, 0.45, 0.85), tokens=5, usage=True),))], 5)
    found = ratios(ours, theirs)
    assert found.ttft == pytest.approx(0.5 / 0.25)
    assert found.itl == pytest.approx(0.1 / 0.3)
    assert found.tpot == pytest.approx(0.1 / 0.15)
    assert found.latency == pytest.approx(1.1 / 0.85)
    assert found.output_per_second == pytest.approx((7 / 1.1) / (5 / 0.85))


def test_lateness_counts_from_the_moment_due() -> None:
    assert figures_of([Round((SINGLE,))], 1).lateness.p50 == 0.25
