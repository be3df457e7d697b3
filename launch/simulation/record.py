"""Measurements of a running simulation: times per request, figures per step, in virtual seconds."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from ...engine.kv.budget import pages_for
from ...engine.planner.group import Group
from ...engine.planner.planner import Planner
from ...engine.planner.request import Request
from ...engine.protocol.frontends import Rejected, Started, TokenBatch
from ...engine.protocol.message import Finish, Message
from ...engine.simulation.simulation import StepSeen

HELD = ("slots", "pages", "prefill")
_TOO_LONG = 400

Floats = NDArray[np.float64]


class Record:
    """Watches a simulation whose requests have handles from 0 on.

    Per request: times ``arrived``, ``started``, ``first`` and ``last`` token, NaN until then;
    ``cached`` and ``emitted`` tokens. Per step: arrays with one entry each. ``held``: seconds of
    steps while waiting requests lacked sequence slots or pages, and while prompts were left for
    later steps.
    """

    def __init__(self, arrived: Floats) -> None:
        size = len(arrived)
        self.arrived = arrived
        self.started, self.first, self.last = (np.full(size, np.nan) for _ in range(3))
        self.cached = np.zeros(size, np.int64)
        self.emitted = np.zeros(size, np.int64)
        self.finished = self.refused = self.unavailable = 0
        self.gaps = array("d")
        self.gap_counts = array("q")
        self._last_batch = -1.0
        # Per step
        self.seconds = array("d")
        self.busy = array("d")
        self.waiting = array("d")
        self.rows = array("q")
        self.tokens = array("q")
        self.imbalance = array("d")
        self.kv_used = array("d")
        self.kv_fullest = array("d")
        self.held = dict.fromkeys(HELD, 0.0)
        self.booking = array("d")  # real seconds
        self.planning = array("d")

    @property
    def answered(self) -> int:
        """Number of requests that have ended, for any reason."""
        return self.finished + self.refused + self.unavailable

    # ----------------------------------------------------------------- messages to frontends

    def told(self, now: float, messages: Iterable[tuple[int, Message]]) -> None:
        for _, message in messages:
            if isinstance(message, TokenBatch):
                self._tokens(now, message)
            elif isinstance(message, Started):
                handles = np.frombuffer(message.handles_i64, np.int64)
                self.started[handles] = now
                self.cached[handles] = np.frombuffer(message.cached_i32, np.int32)
            elif isinstance(message, Rejected):
                if message.status == _TOO_LONG:
                    self.refused += 1
                else:
                    self.unavailable += 1

    def _tokens(self, now: float, batch: TokenBatch) -> None:
        handles = np.frombuffer(batch.handles_i64, np.int64)
        finish = np.frombuffer(batch.finish_u8, np.uint8)
        assert (finish <= Finish.LENGTH).all(), "requests end at their length limit"
        assert len(batch.tokens_i32) == 4 * len(handles), "rows advance by one token"
        begins = np.frombuffer(batch.positions_i32, np.int32) == 0
        self.first[handles[begins]] = now
        before = self.last[handles[~begins]]
        steady = before == self._last_batch  # the common case: rows that also got a token in the last step
        if count := int(steady.sum()):
            self._gap(now - self._last_batch, count)
        for time in before[~steady].tolist():
            self._gap(now - time, 1)
        self.last[handles] = now
        self.emitted[handles] += 1
        self.finished += int(np.count_nonzero(finish))
        self._last_batch = now

    def _gap(self, seconds: float, count: int) -> None:
        self.gaps.append(seconds)
        self.gap_counts.append(count)

    # ----------------------------------------------------------------- steps

    def stepped(self, planner: Planner, step: StepSeen) -> None:
        group, work = planner.group, step.work
        slowest_S = step.own_SD.max(axis=1)
        seconds = step.end - step.start
        self.seconds.append(seconds)
        self.busy.append(float(slowest_S.mean()))
        self.waiting.append(float((slowest_S[:, None] - step.own_SD).mean()))
        self.rows.append(int(work.sampled_D.sum()))
        self.tokens.append(int(work.tokens_D.sum()))
        flight, cost = group.steps.flights[group.steps.last_step], group.cost.cost
        predicted_D = (
            cost.fixed + cost.token * flight.tokens + cost.kv * flight.kv + cost.context * flight.context
        )
        self.imbalance.append(float(predicted_D.max() / predicted_D.mean()))
        used_D = group.kv.used()
        self.kv_used.append(float(used_D.sum() / group.kv.num_pages.sum()))
        self.kv_fullest.append(float((used_D / group.kv.num_pages).max()))
        if lacks := _lacks(group):
            self.held[lacks] += seconds
        if group.prefilling:
            self.held["prefill"] += seconds

    def measured(self, booking: float, planning: float) -> None:
        self.booking.append(booking)
        self.planning.append(planning)


def _lacks(group: Group) -> str:
    """The resource that the first waiting request lacks; empty if it lacks none or none waits."""
    if not len(group.queue):
        return ""
    request: Request = next(iter(group.queue))
    with_slot = [data for data in group.steps.living() if group.rows.num_free(data)]
    if not with_slot:
        return "slots"
    fresh = pages_for(request.num_staged, group.page_size)
    return "" if any(group.has_headroom(data, fresh) for data in with_slot) else "pages"
