"""The wire types: everything the processes of a cluster say to each other.

Messages are ``msgspec`` structs in msgpack, encoded as arrays. Vectors travel as packed little-endian
bytes and never as lists; the suffix of a field names its layout:

    _i32   int32[n]             _pairs   int32[n, 2]
    _i64   int64[n]             _f32     float32[n]
    _u8    uint8[n]             _h128    16 bytes per hash

A *row* is a running sequence of one step; rows of a section are ordered: decoding slots in ascending
order, then ``extend`` in the order given. See ``engine/protocol/slot_table.py`` for what a section does to a rank.
"""

from __future__ import annotations

from enum import IntEnum

import msgspec

HASH_BYTES = 16


class Message(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """Base of every message: an immutable msgpack array."""


# --------------------------------------------------------------------------- sampling


class Sampling(Message, frozen=True):
    """How the tokens of one request are drawn. Values are valid: the frontend has checked them.

    ``temperature`` 0 is greedy; ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 are off. ``num_logprobs`` is
    -1 for none, 0 for the chosen token alone, n for the n likeliest beside it. ``stop_i32`` are the ids
    that end the sequence (end-of-sequence ids unless the request ignores them); they are masked until
    ``min_tokens`` have been sampled. ``num_prompt_logprobs`` is as ``num_logprobs``, for every token of the prompt but the first.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    min_tokens: int = 0
    num_logprobs: int = -1
    stop_i32: bytes = b""
    bias_ids_i32: bytes = b""
    bias_values_f32: bytes = b""
    num_prompt_logprobs: int = -1


# --------------------------------------------------------------------------- the plan


class Admit(Message, frozen=True):
    """Puts a staged prompt into a free sequence slot.

    The prompt of ``staged`` holds the request's own prompt and, after a preemption or a replay, the
    ``num_emitted`` tokens sampled before; KV of its first ``num_cached`` tokens is already in ``pages_i32``.
    The slot samples positions up to ``limit`` - 1 (``limit`` counts prompt and output): none when that is all of the prompt.
    """

    slot: int
    staged: int
    num_cached: int
    num_emitted: int
    limit: int
    pages_i32: bytes
    sampling: Sampling


class Copy(Message, frozen=True):
    """An asynchronous page copy between the pools of two data indices; ``id`` is acknowledged by both."""

    id: int
    source: int
    source_page: int
    target: int
    target_page: int


class Move(Message, frozen=True):
    """Starts receiving one expert's weights into a staging slot (two-phase: landed, then commit)."""

    id: int
    layer: int
    expert: int
    source_rank: int
    target_rank: int
    target_slot: int


class Commit(Message, frozen=True):
    """Makes the landed moves of ``layer`` part of the placement, from this step on."""

    layer: int
    moves_i32: bytes


class Mode(IntEnum):
    """The dispatch shape of a step: every section decodes one token per row, or some row prefills."""

    DECODE = 0
    MIXED = 1


class Header(Message, frozen=True):
    """The part of a plan that all ranks of the group share.

    ``predecessor`` is the step before this one in the chain; a rank refuses a plan on a gap. ``capacity``
    bounds the tokens any rank dispatches, ``cohort`` names the pipeline cohort whose slots (slot modulo
    the number of cohorts) take part. ``checksum`` asks for a checksum of the state after the step.
    """

    group: int
    epoch: int
    step: int
    predecessor: int
    mode: int
    capacity: int
    microbatches: int = 1
    cohort: int = 0
    checksum: bool = False
    counts: bool = False
    moves: tuple[Move, ...] = ()
    commits: tuple[Commit, ...] = ()


class Section(Message, frozen=True):
    """What one data-parallel rank does in a step, applied in the order of the fields.

    ``rebase`` clears every slot first, and every staged prompt below ``staged_from``: plans that were to admit them may
    never have been executed. ``extend_pairs`` are (slot, prompt tokens to compute now). ``bucket``
    bounds the tokens of the section (rows after padding).
    """

    rebase: bool = False
    staged_from: int = 0
    free_i32: bytes = b""
    hold_i32: bytes = b""
    resume_i32: bytes = b""
    admit: tuple[Admit, ...] = ()
    pages_pairs: bytes = b""
    publish_i32: bytes = b""
    publish_h128: bytes = b""
    copies: tuple[Copy, ...] = ()
    extend_pairs: bytes = b""
    bucket: int = 0


class StepPlan(Message, frozen=True):
    """A header and the section of the data index it is sent to. On the socket: two frames."""

    header: Header
    section: Section


# --------------------------------------------------------------------------- the result


class RowLogprobs(Message, frozen=True):
    """Log-probabilities of one sampled token: ``row`` and ``index`` within the row's tokens of this step."""

    row: int
    index: int
    chosen: float
    top_ids_i32: bytes
    top_f32: bytes


class PromptLogprobs(Message, tag="prompt", frozen=True):
    """Log-probabilities of a request's own prompt tokens from ``position`` (at least 1) on: theirs [n], and ids and values [n, top]
    of the likeliest at each. ``of`` is the chunk by its place in ``extend`` where a rank reports, the handle where a frontend is told.

    A token takes 4 + 8 x top bytes: 512 of them with the top 5 are 22,549 bytes, more than a step's message may have, so that the
    planner cuts the chunks of such prompts (``step_builder``).
    """

    of: int
    position: int
    chosen_f32: bytes
    top_ids_i32: bytes
    top_f32: bytes


class StepResult(Message, tag="result", frozen=True):
    """What a rank did in a step.

    ``tokens_i32`` are ragged over the rows that sample, ``counts_u8`` the tokens per row (empty: one each).
    ``ended_i32`` are the rows whose last token is one of their stop ids. ``seconds`` is the time of the step
    on the rank, ``waited`` the part of it spent waiting in collectives. ``expert_i64`` are token counts
    [layer, own slot], empty unless asked for, and ``phases_f32`` the seconds spent in each of ``moe.phases``; both are of
    all steps since they were last asked for.
    """

    group: int
    epoch: int
    step: int
    rank: int
    tokens_i32: bytes = b""
    counts_u8: bytes = b""
    ended_i32: bytes = b""
    logprobs: tuple[RowLogprobs, ...] = ()
    landed_i32: bytes = b""
    copied_i32: bytes = b""
    checksum: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    expert_i64: bytes = b""
    phases_f32: bytes = b""
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()


class Refused(Message, tag="refused", frozen=True):
    """A rank could not follow the chain: it has executed ``last_step`` and was sent something else."""

    group: int
    epoch: int
    rank: int
    last_step: int
    step: int


class Abandoned(Message, tag="abandoned", frozen=True):
    """A rank is well but could not finish ``step``, because a peer did not answer: it waits for the next epoch."""

    group: int
    epoch: int
    rank: int
    step: int
    reason: str


# --------------------------------------------------------------------------- bulk, controller and rank


class RankHello(Message, tag="hello", frozen=True):
    """A rank has loaded its weights and sized its page pool. Sent on the bulk socket, once per connection."""

    rank: int
    host: str
    pid: int
    num_pages: int
    page_size: int
    page_bytes: int
    num_layers: int
    num_expert_slots: int
    device: str
    num_experts: int = 0
    expert_bytes: int = 0


class Staged(Message, tag="staged", frozen=True):
    """The prompt ``staged`` has arrived, its grammar is compiled, and it can be admitted; with an ``error`` it never can."""

    rank: int
    staged: int
    error: str = ""


class Stage(Message, tag="stage", frozen=True):
    """A prompt sent ahead of its admission; admission consumes it. Its last ``num_emitted`` tokens follow ``grammar`` already."""

    staged: int
    tokens_i32: bytes
    grammar: str = ""
    num_emitted: int = 0


class Unstage(Message, tag="unstage", frozen=True):
    """Forget a staged prompt that will not be admitted."""

    staged: int


class Stop(Message, tag="stop", frozen=True):
    """Leave cleanly: finish the step in hand, close sockets, exit 0."""

    reason: str = ""


# --------------------------------------------------------------------------- frontend and controller


class FrontendHello(Message, tag="frontend", frozen=True):
    """A frontend joins. Its lease runs out when it stays silent for ``lease`` seconds (infinity: never).

    ``life`` is drawn once by a process: another under the same name has taken the place of one that died.
    """

    name: str
    lease: float
    life: int = 0


class Submit(Message, tag="submit", frozen=True):
    """A request, tokenised and hashed. Submitting the same ``request_id`` again is harmless.

    ``handle`` is the frontend's own number for it and names it in every later message. ``hashes_h128`` are
    the root and the chained hashes of the prompt's full pages (``engine/kv/hashing.py``), empty when prefix
    caching is off. ``limit`` counts prompt and output tokens. ``grammar`` is what the output must follow, in the Lark
    dialect of llguidance; empty: anything.
    """

    handle: int
    request_id: str
    prompt_i32: bytes
    hashes_h128: bytes
    limit: int
    sampling: Sampling
    priority: int = 0
    grammar: str = ""


class Abort(Message, tag="abort", frozen=True):
    """The client went away, or the frontend saw a stop string: free the request. Acknowledged by FINISHED."""

    handle: int


class Heartbeat(Message, tag="heartbeat", frozen=True):
    """A frontend is alive."""


class Drain(Message, tag="drain", frozen=True):
    """Accept nothing more, finish what runs within ``deadline`` seconds, then say so in ``ClusterState``."""

    deadline: float


class RankLost(Message, tag="lost", frozen=True):
    """The launcher has confirmed that a rank is gone: its process exited, or its node is lost."""

    rank: int
    reason: str


class Finish(IntEnum):
    """Why a request ended; 0 while it runs."""

    NONE = 0
    STOP = 1
    LENGTH = 2
    ABORT = 3
    ERROR = 4


class HandleLogprobs(Message, frozen=True):
    """``RowLogprobs`` for a frontend: ``position`` is the index among the request's output tokens."""

    handle: int
    position: int
    chosen: float
    top_ids_i32: bytes
    top_f32: bytes


class TokenBatch(Message, tag="tokens", frozen=True):
    """All tokens of a step for one frontend: n entries, tokens ragged over ``counts_i32``.

    ``positions_i32`` is the index of the entry's first token among the request's output tokens, so that a
    frontend drops what it already has. ``finish_u8`` is a ``Finish`` per entry; an entry may carry no token.
    """

    step: int
    handles_i64: bytes
    positions_i32: bytes
    counts_i32: bytes
    tokens_i32: bytes
    finish_u8: bytes
    logprobs: tuple[HandleLogprobs, ...] = ()


class Started(Message, tag="started", frozen=True):
    """Requests that have left the queue: parallel vectors of handle and cached prompt tokens."""

    handles_i64: bytes
    cached_i32: bytes


class Rejected(Message, tag="rejected", frozen=True):
    """A request that was not accepted: an HTTP ``status`` (400 or 503) and the reason, in the user's words."""

    handle: int
    status: int
    reason: str
    retry_after: float = 0.0


class RankState(Message, frozen=True):
    """One rank as the controller sees it."""

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


class Totals(Message, frozen=True):
    """What all steps have added up to since the controller started, for the metrics; see ``engine/controller/step_totals.py``.

    ``plan_i64`` and ``step_i64`` count plans by their seconds and steps by their tokens, in the buckets given there. ``tokens_i64`` are
    tokens [data], ``last_tokens_i64`` those of the last step. ``rows`` were computed for them, padding included, ``dispatch_rows``
    bounded for their exchange. ``busy_f64`` and ``waited_f64`` are seconds [rank], ``phases_f64`` [rank, phase]; ``load_i64`` are tokens
    that experts computed [layer, rank], ``balancedness_f64`` [layer] the mean over ranks through the largest, of the last report.
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


class ClusterState(Message, tag="state", frozen=True):
    """The state of the cluster, sent to every frontend twice a second and whenever ``phase`` changes.

    ``phase`` is starting | serving | recovering | draining | drained | failed; ``reason`` says why when not serving. While
    recovering a lost rank is being replaced: requests are taken and wait. Counters
    count since the controller started. ``expert_i64`` is the expert load [layer, expert] of the last report. ``number`` orders states.
    ``placement_i32`` says which experts live on which rank: ``Placement.ranges``.
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


FromRankStep = StepResult | Refused | Abandoned
FromRankBulk = RankHello | Staged
ToRankBulk = Stage | Unstage | Stop
FromFrontend = FrontendHello | Submit | Abort | Heartbeat | Drain | RankLost | Stop
ToFrontend = TokenBatch | PromptLogprobs | Started | Rejected | ClusterState | Stop


class Report(Message, frozen=True):
    """A line from a process to the launcher: ``phase`` is starting | compiling | loading | ready | failed | stopped.

    ``detail`` is text for a person; ``fraction`` the progress of ``phase``; ``address`` where it listens.
    """

    role: str
    index: int
    host: str
    pid: int
    phase: str
    detail: str = ""
    fraction: float = 0.0
    address: tuple[str, ...] = ()
