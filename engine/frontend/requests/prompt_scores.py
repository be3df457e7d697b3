"""Log-probabilities of a prompt's tokens as they come from the engine, and the shape in which
``prompt_logprobs`` shows them.

They arrive in small messages, each converted at once, so a long prompt never blocks the event loop.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Protocol

import msgspec

from ...protocol.frontends import HandleLogprobs
from ...protocol.results import PromptLogprobs
from ...text.tokenizer import Codec
from .logprobs import chosen_value, top_values
from .places import Places


class ScoreSink(Protocol):
    """Takes the log-probabilities of a prompt, from its second token on."""

    def add(
        self, tokens: Sequence[int], entries: Sequence[HandleLogprobs | None], ranks: Sequence[int]
    ) -> None:
        """Takes the next ``tokens``. ``ranks`` is empty where they were not asked for."""


class PromptScores:
    """Hands each log-probability of ``prompt`` to all ``sinks`` once, however often it comes."""

    def __init__(self, prompt: list[int], sinks: Sequence[ScoreSink]) -> None:
        self.known = 1
        self._prompt = prompt
        self._sinks = sinks

    @property
    def complete(self) -> bool:
        """Whether the ``known`` tokens are the whole prompt; the first has no log-probability."""
        return self.known == len(self._prompt)

    def take(self, message: PromptLogprobs) -> bool:
        """Takes the new part of a message that leaves no gap. True if it completes the prompt."""
        assert message.position <= self.known, f"position {message.position} after {self.known}"
        chosen = array("f", message.chosen_f32).tolist()
        ranks = array("i", message.ranks_i32).tolist()
        each = len(message.top_ids_i32) // max(1, len(chosen))
        new = range(self.known - message.position, len(chosen))
        entries = [
            HandleLogprobs(
                handle=0,
                position=0,
                chosen=chosen[at],
                top_ids_i32=message.top_ids_i32[at * each : (at + 1) * each],
                top_f32=message.top_f32[at * each : (at + 1) * each],
            )
            for at in new
        ]
        tokens = self._prompt[self.known : self.known + len(new)]
        for sink in self._sinks:
            sink.add(tokens, entries, ranks[new.start :])
        self.known += len(new)
        return len(new) > 0 and self.complete


class RankedPrompt:
    """``prompt_logprobs`` of an answer: null for the first token, then an object for each, from
    token id to log-probability, rank and text: the prompt's own token, then the ``num_top``
    likeliest.
    """

    def __init__(self, codec: Codec, prompt: list[int], num_top: int) -> None:
        self._codec = codec
        self._num_top = num_top
        self._places = Places(codec, False, [])
        self._places.take(prompt[0])
        self._parts = [b"null"]

    def add(
        self, tokens: Sequence[int], entries: Sequence[HandleLogprobs | None], ranks: Sequence[int]
    ) -> None:
        for token, entry, rank in zip(tokens, entries, ranks, strict=True):
            shown = {str(token): self._shown(token, chosen_value(entry), rank)}
            for place, (other, value) in enumerate(top_values(entry, self._num_top), start=1):
                shown.setdefault(str(other), self._shown(other, value, place))
            self._parts.append(msgspec.json.encode(shown))
            self._places.take(token)

    def document(self) -> msgspec.Raw:
        """The list, as JSON."""
        return msgspec.Raw(b"[" + b",".join(self._parts) + b"]")

    def _shown(self, token: int, value: float, rank: int) -> dict[str, float | int | str]:
        text = self._codec.piece(token, self._places.opening).decode("utf-8", "replace")
        return {"logprob": value, "rank": rank, "decoded_token": text}
