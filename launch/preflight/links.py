"""Judges connections between nodes, and their clocks."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import msgspec

from .finding import Finding
from .reach import Link

_SLOW_TRIP = 2e-3  # seconds; the controller has 2 ms from a result to the next plan
_SLOW_RATE = 100e6  # bytes/s: less than a gigabit/s
_SKEW = 1.0


class Clock(msgspec.Struct, frozen=True):
    """Seconds by which a node's clock is ahead of the launcher's, plus or minus ``doubt``."""

    node: str
    ahead: float
    doubt: float


def judge_links(links: Sequence[Link]) -> list[Finding]:
    """Findings for broken and slow connections, and one for all good ones."""
    found, good = [], []
    for link in links:
        where = f"{link.source} -> {link.target}"
        if link.problem:
            todo = (
                f"open TCP from {link.source} to {link.target} on all ports: "
                "ranks use ports that the system chooses"
            )
            found.append(Finding("error", "network", link.problem, where, todo))
            continue
        good.append(link)
        if link.round_trip > _SLOW_TRIP:
            text = f"{1e3 * link.round_trip:.2f} ms per round trip; every step needs several"
            todo = "use nodes that are closer, or check other traffic on the network"
            found.append(Finding("warning", "network", text, where, todo))
        if 0.0 < link.rate < _SLOW_RATE:
            text = f"{link.rate / 1e6:.0f} MB/s through TCP"
            todo = "check the adapter's speed and its other traffic"
            found.append(Finding("warning", "network", text, where, todo))
    if not good:
        return found
    trips = [link.round_trip for link in good]
    rates = [link.rate for link in good if link.rate]
    speed = f", {min(rates) / 1e9:.2f} to {max(rates) / 1e9:.2f} GB/s through one TCP stream" if rates else ""
    trip = f"round trip {1e3 * statistics.median(trips):.2f} ms, at most {1e3 * max(trips):.2f}"
    return [*found, Finding("ok", "network", f"{len(good)} of {len(links)} directions work, {trip}{speed}")]


def judge_clocks(clocks: Sequence[Clock]) -> list[Finding]:
    """Findings for clocks that differ: they only date logs and recordings, so nothing fails."""
    todo = "run chrony or another NTP client there"
    found = [
        Finding("warning", "clock", f"{clock.ahead:+.1f} s from the launcher's", clock.node, todo)
        for clock in clocks
        if abs(clock.ahead) - clock.doubt > _SKEW
    ]
    if found or not clocks:
        return found
    most = max(abs(clock.ahead) + clock.doubt for clock in clocks)
    return [Finding("ok", "clock", f"at most {most:.3f} s apart")]
