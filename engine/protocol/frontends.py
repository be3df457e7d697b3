"""Messages between frontends, the launcher and the controller."""

from __future__ import annotations

from .cluster_state import ClusterState
from .message import Message, Sampling, Stop
from .results import PromptLogprobs
from .timeline import AskTimeline, StepSpans, TimelineEnd


class FrontendHello(Message, tag="frontend", frozen=True):
    """A frontend joins. Its lease ends after ``lease`` seconds of silence (infinity: never).

    A process draws ``life`` once: another value under the same name is the successor of a process
    that died.
    """

    name: str
    lease: float
    life: int = 0


class Submit(Message, tag="submit", frozen=True):
    """A request, tokenised and hashed. Submitting an open ``handle`` again is harmless.

    ``handle`` is the frontend's own number for it in every later message.
    ``hashes_h128`` are the root and the chained hashes of the prompt's full pages
    (``engine/kv/hashing.py``), empty when prefix caching is off. ``limit`` counts prompt and output
    tokens. ``grammar`` constrains the output, in the Lark dialect of llguidance; empty: no
    constraint. ``emitted_i32`` are output tokens that the frontend has already: the request goes on
    after them. Requests with the same ``affinity``, other than 0, gather on one data index where
    that costs little.
    """

    handle: int
    request_id: str
    prompt_i32: bytes
    hashes_h128: bytes
    limit: int
    sampling: Sampling
    priority: int = 0
    grammar: str = ""
    emitted_i32: bytes = b""
    affinity: int = 0


class Abort(Message, tag="abort", frozen=True):
    """Frees a request: its client has left, or the frontend saw a stop string. A ``TokenBatch``
    entry with ``Finish.ABORT`` acknowledges it.
    """

    handle: int


class Heartbeat(Message, tag="heartbeat", frozen=True):
    """A frontend is alive."""


class Drain(Message, tag="drain", frozen=True):
    """Ends service: accept no request, finish running ones within ``deadline`` seconds, then report
    it in ``ClusterState``.
    """

    deadline: float


class RankLost(Message, tag="lost", frozen=True):
    """The launcher has confirmed that a rank is gone: its process ``pid`` exited, or its node is
    lost.
    """

    rank: int
    reason: str
    pid: int = 0


class Degraded(Message, tag="degraded", frozen=True):
    """The launcher names what serves with less than all its processes; empty: nothing."""

    reason: str


class HandleLogprobs(Message, frozen=True):
    """``RowLogprobs`` for a frontend; ``position`` counts the request's output tokens."""

    handle: int
    position: int
    chosen: float
    top_ids_i32: bytes
    top_f32: bytes


class TokenBatch(Message, tag="tokens", frozen=True):
    """All tokens of a step for one frontend: n entries, tokens ragged over ``counts_i32``.

    ``positions_i32`` is the index of the entry's first token among the request's output tokens, so
    that a frontend can drop tokens that it has. ``finish_u8`` is a ``Finish`` per entry; an entry
    may carry no token.
    """

    step: int
    handles_i64: bytes
    positions_i32: bytes
    counts_i32: bytes
    tokens_i32: bytes
    finish_u8: bytes
    logprobs: tuple[HandleLogprobs, ...] = ()


class Started(Message, tag="started", frozen=True):
    """Requests that a plan has admitted, for the first time or again: vectors of handles, tokens
    from the cache, data indices, preemptions so far, and epochs of the plan.
    """

    handles_i64: bytes
    cached_i32: bytes
    data_i32: bytes
    preemptions_i32: bytes
    epochs_i32: bytes


class Rejected(Message, tag="rejected", frozen=True):
    """A request that was not accepted (400 or 503) or cannot be completed (500): an HTTP ``status``
    and a reason for the user.
    """

    handle: int
    status: int
    reason: str
    retry_after: float = 0.0


FromFrontend = FrontendHello | Submit | Abort | Heartbeat | Drain | AskTimeline | RankLost | Degraded | Stop


ToFrontend = TokenBatch | PromptLogprobs | Started | Rejected | ClusterState | StepSpans | TimelineEnd | Stop
