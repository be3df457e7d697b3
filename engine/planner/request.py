"""A request as the planner holds it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from ..kv.hashing import chain_hashes
from ..protocol.frontends import Submit
from ..protocol.message import HASH_BYTES, Sampling


class State:
    """The state of a row and of the request in it; plain numbers, since arrays hold them.

    PRELOADING: row and pages are reserved, the prompt is on its way to the ranks. READY: the ranks
    have it. DRAINING: removed by a plan; the row is reused once every result that may name it is
    in.
    """

    FREE: Final = 0
    PRELOADING: Final = 1
    READY: Final = 2
    PREFILL: Final = 3
    DECODE: Final = 4
    DRAINING: Final = 5


@dataclass(slots=True, eq=False)
class Request:
    """One open request.

    ``emitted_i32`` are tokens sampled in earlier admissions. ``order`` counts arrivals. ``scored``
    is the last prompt position whose log-probability is known, if the client asked for them.
    ``hashes_h128`` are the hashes of its full blocks after ``root``, empty without prefix caching.
    ``staged`` identifies its preloaded prompt, ``unacknowledged`` the ranks that lack it.
    ``preemptions`` counts how often others took its pages. ``num_staged`` tokens must be on a rank
    before it can sample the next one.
    """

    frontend: int
    handle: int
    request_id: str
    order: int
    prompt_i32: bytes
    root: bytes
    hashes_h128: bytes
    limit: int
    sampling: Sampling
    priority: int
    grammar: str
    emitted_i32: bytes = b""
    affinity: int = 0
    scored: int = 0
    row: int = -1
    staged: int = -1
    unacknowledged: set[int] = field(default_factory=set)
    started: bool = False
    preemptions: int = 0
    num_staged: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_staged = (len(self.prompt_i32) + len(self.emitted_i32)) // 4

    @classmethod
    def from_submit(cls, frontend: int, order: int, submit: Submit) -> Request:
        return cls(
            frontend=frontend,
            handle=submit.handle,
            request_id=submit.request_id,
            order=order,
            prompt_i32=submit.prompt_i32,
            root=submit.hashes_h128[:HASH_BYTES],
            hashes_h128=submit.hashes_h128[HASH_BYTES:],
            limit=submit.limit,
            sampling=submit.sampling,
            priority=submit.priority,
            grammar=submit.grammar,
            emitted_i32=submit.emitted_i32,
            affinity=submit.affinity,
        )

    @property
    def num_prompt(self) -> int:
        return len(self.prompt_i32) // 4

    @property
    def num_emitted(self) -> int:
        return len(self.emitted_i32) // 4

    @property
    def num_skippable(self) -> int:
        """Leading tokens that need not be computed if they are cached. The last token is always
        computed, to sample from it; so is every token whose successor's log-probability is still to
        be reported.
        """
        owes = self.sampling.num_prompt_logprobs >= 0 and self.scored < self.num_prompt - 1
        return self.scored if owes else self.num_staged - 1

    @property
    def score_bytes(self) -> int:
        """Bytes that each prompt token adds to the result of a step; see ``PromptLogprobs``."""
        asked = self.sampling.num_prompt_logprobs
        return 4 + 8 * asked + 4 * self.sampling.prompt_ranks if asked >= 0 else 0

    @property
    def num_hashes(self) -> int:
        return len(self.hashes_h128) // HASH_BYTES

    def tokens_between(self, start: int, end: int, later_i32: bytes) -> bytes:
        """Tokens [start, end) of prompt, earlier outputs and ``later_i32``, as int32."""
        if 4 * end <= len(self.prompt_i32):
            return self.prompt_i32[4 * start : 4 * end]
        return (self.prompt_i32 + self.emitted_i32 + later_i32)[4 * start : 4 * end]

    def emit(self, tokens_i32: bytes) -> None:
        """Appends tokens that were sampled since its admission."""
        self.emitted_i32 += tokens_i32
        self.num_staged += len(tokens_i32) // 4

    def hash_outputs(self, tokens_i32: bytes, page_size: int) -> None:
        """Appends the hashes of the blocks that ``tokens_i32`` complete: those sampled since its
        admission.
        """
        start = self.num_hashes * page_size * 4
        if len(self.prompt_i32) + len(self.emitted_i32) + len(tokens_i32) >= start + page_size * 4:
            tail = (
                self.prompt_i32[start:]
                + self.emitted_i32[max(0, start - len(self.prompt_i32)) :]
                + tokens_i32
            )
            parent = self.hashes_h128[-HASH_BYTES:] or self.root
            self.hashes_h128 += chain_hashes(parent, tail, page_size)[HASH_BYTES:]
