"""The closing sentence of a simulation: the bottleneck, and the recipe key that moves it."""

from __future__ import annotations

from dataclasses import dataclass

from ...engine.planner.settings import Settings
from .report import PageUse, Requests, Spread, Steps

_NOTABLE = 0.1  # least share of step time for a delay of requests to be the bottleneck
_UNEVEN = 0.3  # the same for waits for the slowest rank and imbalance
_PARTS = {"compute": "computing", "memory": "memory bandwidth", "network": "the exchange between ranks"}


@dataclass(frozen=True)
class Causes:
    """Figures of a report that decide which resource binds."""

    requests: Requests
    wait: Spread
    steps: Steps
    pages: PageUse
    bound: dict[str, float]
    held: dict[str, float]

    @property
    def prefill_binds(self) -> bool:
        """Whether prompts are often left over and half of the requests wait longer than a step."""
        wait, step = self.wait.p50 or 0.0, self.steps.seconds.p99 or 0.0
        return self.held["prefill"] >= _NOTABLE and wait > 2 * step


def bottleneck(settings: Settings, causes: Causes) -> str:
    """Names what delays requests before they run, and the slowest part of steps."""
    requests, steps = causes.requests, causes.steps
    if not steps.count:
        if requests.refused < requests.asked:
            return "Nothing ran."
        limits = "which model.max_len and the pages limit"
        return (
            f"Nothing ran: all requests are longer than the context of {settings.max_len:,} tokens, {limits}."
        )
    part = max(causes.bound, key=lambda name: causes.bound[name])
    sentence = f"{_delay(settings, causes)} {_PARTS[part]} ({causes.bound[part]:.0%} of it)"
    if requests.unavailable:
        queue = f"the queue of {settings.spec.max_queue:,} (scheduler.max_queue)"
        sentence += f"; {queue} was full for {requests.unavailable:,} requests"
    return f"{sentence}."


def _delay(settings: Settings, causes: Causes) -> str:
    """The cause of delay, up to the name of the slowest part.

    Checked in order: without pages a request gets no slot, without a slot no prefill.
    """
    spec, steps, pages, held = settings.spec, causes.steps, causes.pages, causes.held
    most = "; the largest part of step time is"
    if held["pages"] >= max(_NOTABLE, held["slots"]):
        return (
            f"KV pages bind: for {held['pages']:.0%} of step time requests waited while sequence slots "
            f"were free and pages not (the fullest rank reached {pages.peak_of_a_rank:.0%}){most}"
        )
    if held["slots"] >= _NOTABLE:
        return (
            f"Sequence slots bind: for {held['slots']:.0%} of step time requests waited while all "
            f"{spec.max_running:,} of every rank (scheduler.max_running) were taken, "
            f"with at most {pages.peak:.0%} of the pages in use{most}"
        )
    if causes.prefill_binds:
        return (
            f"Prefill binds: for {held['prefill']:.0%} of step time prompts were left over, as a step takes "
            f"at most {spec.max_batch_tokens:,} tokens per rank (scheduler.max_batch_tokens) "
            f"and {spec.inter_token_target:g} s beside decode (scheduler.inter_token_target){most}"
        )
    if steps.waiting >= _UNEVEN:
        few = (
            f", as few have prompts to compute and a step may take {spec.inter_token_target:g} s "
            "(scheduler.inter_token_target)"
        )
        reason = few if held["prefill"] >= _NOTABLE else ""
        return (
            f"Imbalance binds: for {steps.waiting:.0%} of step time ranks wait for the slowest{reason}{most}"
        )
    if steps.idle >= 0.5:
        return f"Nothing binds: for {steps.idle:.0%} of the time there was no step{most}"
    return f"Nothing delays requests for long{most}"
