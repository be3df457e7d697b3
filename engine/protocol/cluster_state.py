"""The state of the cluster, from the controller, and a process's report to the launcher."""

from __future__ import annotations

from .message import Message


class RankState(Message, frozen=True):
    """One rank as the controller sees it. ``recovery``: how it recovers when a peer is lost.
    ``transports``: how its groups exchange; empty before its first step and if it has no peer.
    """

    rank: int
    host: str
    pid: int
    state: str
    num_running: int
    pages_used: int
    pages_cached: int
    pages_total: int
    step_seconds: float
    wait_seconds: float
    recovery: str = ""
    transports: str = ""


class Totals(Message, frozen=True):
    """Sums over all steps since the controller started, for the metrics; see
    ``engine/controller/step_totals.py``.

    ``plan_i64`` and ``step_i64`` count plans by seconds and steps by tokens, in the buckets
    ``PLAN_SECONDS`` and ``STEP_TOKENS``. ``tokens_i64`` are tokens [data], ``last_tokens_i64``
    those of the last step. ``rows`` were computed for them, with padding; ``dispatch_rows`` bound
    their exchange. ``busy_f64`` and ``waited_f64`` are seconds [rank], ``phases_f64`` [rank,
    phase]. ``load_i64`` are tokens that experts computed [layer, rank]; ``balancedness_f64``
    [layer] is mean load / maximum load over ranks, from the last report.
    """

    plan_i64: bytes = b""
    plan_seconds: float = 0.0
    step_i64: bytes = b""
    tokens_i64: bytes = b""
    last_tokens_i64: bytes = b""
    rows: int = 0
    dispatch_rows: int = 0
    overlap: bool = False
    overlapped: int = 0
    moved_bytes: int = 0
    busy_f64: bytes = b""
    waited_f64: bytes = b""
    phases_f64: bytes = b""
    load_i64: bytes = b""
    balancedness_f64: bytes = b""


class OverlapChoice(Message, frozen=True):
    """The choice of ``overlap: auto`` for steps of one dispatch capacity. ``waits``: share of a
    step waited for tokens; ``ratio``: time with overlap in that without; None: not measured.
    """

    capacity: int
    microbatches: int
    waits: float | None
    ratio: float | None


class ClusterState(Message, tag="state", frozen=True):
    """The state of the cluster, sent to every frontend twice a second and whenever ``phase``
    changes.

    ``phase`` is starting | serving | recovering | draining | drained | failed; ``reason`` says why
    when not serving. While a lost rank is replaced (recovering), requests are accepted and wait.
    Counters count since the controller started. ``expert_i64`` is the expert load [layer, expert]
    of the last report. ``number`` orders states. ``placement_i32`` is ``Placement.ranges``: the
    experts of each rank. ``degraded`` names what is missing while the cluster serves all the same.
    ``overlap`` is off | on | auto.
    ``placement_version`` is the id of the last moves of experts that were committed, ``moves_open``
    the number of those that are under way.
    ``num_deferred`` of the waiting requests step aside for a block that another one computes.
    """

    phase: str
    reason: str
    epoch: int
    step: int
    max_len: int
    page_size: int
    prefix_caching: bool
    num_running: int
    num_waiting: int
    kv_usage: float
    prompt_tokens: int
    generation_tokens: int
    prefix_queries: int
    prefix_hits: int
    preemptions: int
    steps: int
    imbalance: float
    plan_seconds: float
    expert_layers: int = 0
    expert_i64: bytes = b""
    ranks: tuple[RankState, ...] = ()
    number: int = 0
    totals: Totals = Totals()
    placement_i32: bytes = b""
    degraded: str = ""
    overlap: str = "off"
    overlap_choices: tuple[OverlapChoice, ...] = ()
    num_deferred: int = 0
    placement_version: int = 0
    moves_open: int = 0


class Report(Message, frozen=True):
    """A line from a process to the launcher: ``phase`` is starting | compiling | loading | ready |
    failed | stopped.

    ``detail`` is text for a person, ``fraction`` the progress of ``phase``, ``address`` the
    addresses that the process listens at.
    """

    role: str
    index: int
    host: str
    pid: int
    phase: str
    detail: str = ""
    fraction: float = 0.0
    address: tuple[str, ...] = ()


# Upper bounds of the buckets of ``Totals``.
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
PLAN_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.008, 0.016, 0.05, 0.1, 0.5)
