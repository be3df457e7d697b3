"""From calls between nodes, and from their clocks, to findings."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import msgspec

from .finding import Finding
from .reach import Link

_SLOW_TRIP = 2e-3  # seconds; the controller has 2 ms from a result to the next plan
_SLOW_RATE = 100e6  # bytes a second: less than a gigabit
_SKEW = 1.0


class Clock(msgspec.Struct, frozen=True):
    """Seconds by which a node's clock is ahead of the launcher's, give or take ``doubt``."""

    node: str
    ahead: float
    doubt: float


def judge_links(links: Sequence[Link]) -> list[Finding]:
    """What is broken or slow between nodes; one line for all that is well."""
    found, good = [], []
    for link in links:
        where = f"{link.source} -> {link.target}"
        if link.problem:
            todo = f"open TCP from {link.source} to {link.target} on all ports: ranks meet on ports that the system chooses"
            found.append(Finding("error", "network", link.problem, where, todo))
            continue
        good.append(link)
        if link.round_trip > _SLOW_TRIP:
            text = f"{1e3 * link.round_trip:.2f} ms for a round trip; every step takes several"
            found.append(
                Finding(
                    "warning",
                    "network",
                    text,
                    where,
                    "use nodes that are nearer, or see what else uses the network",
                )
            )
        if 0.0 < link.rate < _SLOW_RATE:
            text = f"{link.rate / 1e6:.0f} MB/s through TCP"
            found.append(
                Finding("warning", "network", text, where, "see the adapter's speed, and what else uses it")
            )
    if not good:
        return found
    trips = [link.round_trip for link in good]
    rates = [link.rate for link in good if link.rate]
    speed = f", {min(rates) / 1e9:.2f} to {max(rates) / 1e9:.2f} GB/s through one TCP stream" if rates else ""
    trip = f"round trip {1e3 * statistics.median(trips):.2f} ms, at most {1e3 * max(trips):.2f}"
    return [*found, Finding("ok", "network", f"{len(good)} of {len(links)} directions work, {trip}{speed}")]


def judge_clocks(clocks: Sequence[Clock]) -> list[Finding]:
    """Clocks only date logs and recordings: nothing fails when they differ, but nobody can follow
    what happened.
    """
    found = [
        Finding(
            "warning",
            "clock",
            f"{clock.ahead:+.1f} s from the launcher's",
            clock.node,
            "run chrony or another NTP client there",
        )
        for clock in clocks
        if abs(clock.ahead) - clock.doubt > _SKEW
    ]
    if found or not clocks:
        return found
    return [
        Finding(
            "ok", "clock", f"at most {max(abs(clock.ahead) + clock.doubt for clock in clocks):.3f} s apart"
        )
    ]
