"""Messages of a timeline: when the phases of some steps begin and end on every rank, for one who
asks.

Times are seconds of ``time.perf_counter`` of the process that tells them: on Linux a clock that all
processes of a host share.
"""

from __future__ import annotations

from enum import IntEnum

from ...parallel.mesh import Mesh
from .message import Message

MOST_STEPS = 512
"""Steps of one timeline."""

MOST_SECONDS = 60.0
"""Seconds that it may take to plan them."""

MOST_SPANS = 250_000
"""Spans of one timeline: about 30 MB of JSON."""


class Track(IntEnum):
    """The line of a rank that a span lies on."""

    STEP = 0
    FIRST = 1
    SECOND = 2


class Span(IntEnum):
    """The kind of a span. Waits lie inside of others; ``GATE`` is norm and gate, ``OTHER`` anything
    between two layers: embedding, dense layers, tokens gathered over a tensor group.
    """

    STEP = 0
    APPLY = 1
    FORWARD = 2
    SAMPLE = 3
    ATTENTION = 4
    GATE = 5
    DISPATCH = 6
    SHARED_EXPERTS = 7
    EXPERTS = 8
    COMBINE = 9
    OTHER = 10
    DISPATCH_WAIT = 11
    COMBINE_WAIT = 12
    TENSOR_WAIT = 13
    STAGE_WAIT = 14
    WAIT = 15

    @property
    def title(self) -> str:
        return self.name.lower().replace("_", " ")


class AskTimeline(Message, tag="timeline", frozen=True):
    """Asks for the timeline of the next ``steps`` steps, as far as they are planned within
    ``seconds``.
    """

    id: int
    steps: int
    seconds: float


class StepSpans(Message, tag="spans", frozen=True):
    """Spans of one step on a rank, which began with its plan at ``begun`` and had its result at
    ``ended``. The controller hands it on to the frontend that asked.

    ``kinds_i32`` [n, 3]: a ``Span``, its ``Track``, and the layer or -1; ``times_f64`` [n, 2]:
    begin and end. ``num_dropped`` were too many. ``clock`` names the clock: equal on processes that
    share one.
    """

    rank: int
    epoch: int
    step: int
    begun: float
    ended: float
    clock: str
    kinds_i32: bytes = b""
    times_f64: bytes = b""
    num_dropped: int = 0

    @property
    def num_spans(self) -> int:
        return len(self.times_f64) // 16


class TimelineEnd(Message, tag="timeline_end", frozen=True):
    """No more spans follow for the ask ``id``. ``reason``: why there are fewer than asked; empty
    where all are there. ``status`` is that of HTTP: 200, or an error where nothing was recorded.

    ``steps_i64`` [n, 5]: epoch, step, microbatches, capacity and tokens of each plan.
    ``times_f64`` [n, 2]: its turn began, it was sent. ``answered_f64`` [n, world]: the results of
    ranks were read; NaN for none. ``num_dropped`` spans were more than ``MOST_SPANS``.
    """

    id: int
    reason: str
    status: int = 200
    mesh: Mesh = Mesh()
    clock: str = ""
    steps_i64: bytes = b""
    times_f64: bytes = b""
    answered_f64: bytes = b""
    num_dropped: int = 0


def clock_name() -> str:
    """The name of this process's clock: that of the kernel's start."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""
