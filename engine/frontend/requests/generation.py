"""One generation: its request to the engine, the tokens received so far, and their text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from ...protocol.frontends import HandleLogprobs, Submit
from ...protocol.message import Finish
from ...protocol.results import PromptLogprobs
from ...text.detokenizer import Detokenizer
from ..api.errors import ApiError
from ..formats.parser import ReplyParser
from .echo import Echo
from .places import Places
from .prompt_scores import PromptScores, RankedPrompt
from .reasoning_tokens import ReasoningTokens
from .stops import StopMatcher, StopRule

MAX_RUNS = 32  # number of runs kept: the first ones
REASONS = {Finish.STOP: "stop", Finish.LENGTH: "length", Finish.ABORT: "abort", Finish.ERROR: "error"}


class Sink(Protocol):
    """Receives the progress of a generation: a collected reply or a stream."""

    def advance(self, generation: Generation) -> None:
        """Takes note of new tokens or the finish; not called again after the finish."""

    def fail(self, generation: Generation, error: ApiError) -> None:
        """The generation ended without a result."""


@dataclass(frozen=True, slots=True)
class Stay:
    """A plan has admitted the generation at a time, with ``num_tokens`` of output; see
    ``Started``.
    """

    at: float
    data: int
    epoch: int
    num_cached: int
    preemptions: int
    num_tokens: int


@dataclass(slots=True, eq=False)
class Generation:
    """One choice of one prompt; one ``Submit``.

    ``tokens`` are those that count for the client: none after a stop string, whatever the engine
    has computed meanwhile. ``num_received`` counts all that the engine sent, ``num_gaps`` how often
    some were lost. ``pieces`` is text that the sink has not taken, ``num_taken`` the tokens it has
    taken; with a ``parser`` the text goes there instead. ``num_cached`` prompt tokens came from the
    cache; others took its pages ``num_preemptions`` times. It was admitted ``num_runs`` times, of
    which ``runs`` has the first. ``prompt_scores`` collects
    log-probabilities of the prompt for ``echo`` and ``ranked``. An ``echo`` becomes text once they
    are complete, which is before the first token. ``places`` are those of the output's tokens in
    the text of a completion. Times are seconds of the monotonic clock, 0 for what has not happened
    yet.
    """

    submit: Submit
    index: int
    sink: Sink
    prompt: list[int]
    detokenizer: Detokenizer
    stop: StopRule
    matcher: StopMatcher | None = None
    echo: Echo | None = None
    ranked: RankedPrompt | None = None
    prompt_scores: PromptScores | None = None
    places: Places | None = None
    parser: ReplyParser | None = None
    logprobs: list[HandleLogprobs | None] | None = None
    pieces: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    num_received: int = 0
    num_gaps: int = 0
    num_taken: int = 0
    num_cached: int = 0
    num_preemptions: int = 0
    num_runs: int = 0
    runs: list[Stay] = field(default_factory=list)
    finish: str | None = None
    stop_reason: int | str | None = None
    submitted: float = 0.0
    started: float = 0.0
    first: float = 0.0
    last: float = 0.0
    stop_ids: frozenset[int] = field(init=False)  # copies from ``stop``, since every token reads them
    _reasoning: ReasoningTokens | None = field(init=False, default=None)  # None once they are counted
    _num_reasoning: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.stop_ids = self.stop.ids
        if self.parser is not None and not self.parser.reasoning_over:
            self._reasoning = ReasoningTokens(self.parser)

    def run(self, stay: Stay) -> None:
        """A plan has admitted it, for the first time or again."""
        self.num_runs += 1
        self.num_preemptions = max(stay.preemptions, self.num_preemptions)
        if len(self.runs) < MAX_RUNS:
            self.runs.append(stay)
        if not self.started:
            self.started = stay.at
            self.num_cached = stay.num_cached

    @property
    def handle(self) -> int:
        return self.submit.handle

    @property
    def max_tokens(self) -> int:
        return self.submit.limit - len(self.prompt)

    @property
    def ended(self) -> bool:
        return self.finish is not None

    @property
    def stopped_early(self) -> bool:
        """Whether a stop string or the last allowed tool call ended it, which the engine cannot
        see.
        """
        return (self.matcher is not None and self.matcher.matched is not None) or (
            self.parser is not None and self.parser.full
        )

    @property
    def pending(self) -> bool:
        """Whether the sink has something to take."""
        return bool(self.pieces) or (self.parser is not None and self.parser.pending)

    @property
    def finish_reason(self) -> str | None:
        """``finish`` as the client sees it."""
        return self.finish if self.parser is None or self.finish is None else self.parser.reason(self.finish)

    @property
    def num_reasoning(self) -> int:
        """Number of ``tokens`` between the tags of the reasoning."""
        return self._num_reasoning if self._reasoning is None else self._reasoning.count

    def accept_prompt(self, prompt: PromptLogprobs) -> None:
        """Takes log-probabilities of the prompt. With the last of them the prompt becomes text."""
        if self.prompt_scores is not None and self.prompt_scores.take(prompt) and self.echo is not None:
            self.pieces.append(self.echo.text)

    @property
    def lacks_prompt(self) -> bool:
        """Whether log-probabilities of the prompt are still missing."""
        return self.prompt_scores is not None and not self.prompt_scores.complete

    def accept(
        self, tokens: list[int], logprobs: Callable[[int], HandleLogprobs | None] | None = None
    ) -> None:
        """Takes the next tokens, up to the one that ends the generation. ``logprobs`` gives the
        log-probabilities of an output position.
        """
        if self._reasoning is not None and self._reasoning.over:
            self._num_reasoning = self._reasoning.count
            self._reasoning = None
        for token in tokens:
            self.tokens.append(token)
            if self.logprobs is not None:
                self.logprobs.append(logprobs(len(self.tokens) - 1) if logprobs is not None else None)
            if token in self.stop_ids:
                self._end_with(token)
                return
            text = self.detokenizer.push(token)
            if self._reasoning is not None:
                self._reasoning.add(text)
            if self.matcher is not None:
                text = self._match(self.matcher, text)
            if text:
                self._add_text(text)
            if self.finish is None and len(self.tokens) >= self.max_tokens:
                self.close("length")
                return
            if self.finish is not None:
                self._end_text()
                return

    def close(self, reason: str) -> None:
        """Ends the generation and releases the text still held back."""
        assert self.finish is None, "closed twice"
        self.finish = reason
        tail = self.detokenizer.finish()
        if self.matcher is not None:
            tail = self._match(self.matcher, tail)
            if self.matcher.matched is None:
                tail += self.matcher.finish()
        if tail:
            self._add_text(tail)
        self._end_text()

    def take_text(self) -> str:
        """The text since the last call, for a generation without a parser."""
        text = self.pieces[0] if len(self.pieces) == 1 else "".join(self.pieces)
        self.pieces.clear()
        return text

    def _end_with(self, token: int) -> None:
        """Ends at a stop id: it counts as a token, and its text is shown only if asked for."""
        if self.stop.include:
            text = self.detokenizer.push(token)
            self._add_text(self.matcher.push(text, armed=False) if self.matcher is not None else text)
        self.stop_reason = None if token in self.stop.eos_ids else token
        self.close("stop")

    def _add_text(self, text: str) -> None:
        if self.parser is None:
            self.pieces.append(text)
            return
        self.parser.push(text)
        if self.parser.full and self.finish is None:
            self.finish = "stop"

    def _end_text(self) -> None:
        if self.parser is not None:
            self.parser.finish()

    def _match(self, matcher: StopMatcher, text: str) -> str:
        text = matcher.push(text, armed=len(self.tokens) > self.submit.sampling.min_tokens)
        if matcher.matched is not None:
            self.finish = "stop"
            self.stop_reason = matcher.matched
        return text
