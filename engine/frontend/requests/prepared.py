"""A request once it is prepared: all that the engine and the reply need to know of it."""

from __future__ import annotations

from dataclasses import dataclass

from ...protocol.message import Sampling
from ..formats.choice import Manner
from ..grammars.claim import Claim
from .stops import StopRule


@dataclass(frozen=True, slots=True)
class Outline:
    """The fields that all documents of an answer repeat, and the optional parts the client wants.

    ``num_prompt_logprobs`` is that of ``prompt_logprobs``, -1 for none. ``interval`` is the least
    number of new tokens in a chunk of a stream. ``legacy_call``: the client sent ``functions`` and
    reads ``function_call``.
    """

    id: str
    created: int
    model: str
    chat: bool
    num_logprobs: int = -1
    return_token_ids: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    interval: int = 1
    num_prompt_logprobs: int = -1
    legacy_call: bool = False

    def reason(self, finish: str | None) -> str | None:
        """The finish reason of a choice in the words of the client."""
        return "function_call" if self.legacy_call and finish == "tool_calls" else finish


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, packed as int32 and hashed by page; ``max_tokens`` may follow them. ``text`` is
    the prompt as it is shown before the completion, empty if it is not.
    """

    ids: list[int]
    packed_i32: bytes
    hashes_h128: bytes
    max_tokens: int
    text: str = ""


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """Ready to be submitted: for each prompt one generation per choice.

    ``samplings`` are those of the choices, which differ in their seeds. ``manner`` says how replies
    are parsed, None where they are plain text. ``claims`` are grammars that have to be checked
    first; replies follow the last of them, or are free. ``affinity``: as in ``Submit``. ``echo``:
    the prompt is shown before the completion.
    """

    outline: Outline
    prompts: list[Prompt]
    samplings: list[Sampling]
    stop: StopRule
    manner: Manner | None = None
    claims: tuple[Claim, ...] = ()
    priority: int = 0
    affinity: int = 0
    echo: bool = False
    skip_special_tokens: bool = True

    @property
    def grammar(self) -> str:
        """The grammar that replies follow, empty where they are free."""
        return self.claims[-1].grammar if self.claims else ""

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of the prompt's own tokens are asked for, by either field."""
        return self.samplings[0].num_prompt_logprobs >= 0

    @property
    def echoes_scores(self) -> bool:
        """Whether the prompt is shown with its log-probabilities."""
        return self.echo and self.outline.num_logprobs >= 0

    @property
    def needs_engine(self) -> bool:
        """Whether the engine has to compute anything: not if only the prompt is shown."""
        return self.scores_prompt or self.prompts[0].max_tokens > 0
