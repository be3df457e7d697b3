"""A prompt that is shown before its completion, with the log-probabilities of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...protocol.frontends import HandleLogprobs
from ...text.tokenizer import Codec
from .logprobs import text_logprobs
from .places import Places


class Echo:
    """The prompt's part of ``choices[].logprobs`` in a text completion; see ``PromptScores``.

    ``text`` is the prompt as it is shown, and offsets are places in it.
    """

    def __init__(
        self, codec: Codec, prompt: list[int], text: str, num_top: int, skip_special_tokens: bool
    ) -> None:
        self.text = text
        self._codec = codec
        self._num_top = num_top
        self._places = Places(codec, skip_special_tokens, [])
        self._shown = False
        first = text_logprobs(codec, prompt[:1], [None], 0, self._places)
        self._lists = first | {"token_logprobs": [None], "top_logprobs": [None]}

    def add(
        self, tokens: Sequence[int], entries: Sequence[HandleLogprobs | None], ranks: Sequence[int]
    ) -> None:
        part = text_logprobs(self._codec, tokens, entries, self._num_top, self._places)
        for name, values in part.items():
            self._lists[name] += values

    def before(self, shown: dict[str, Any]) -> dict[str, Any]:
        """Puts the complete prompt before ``shown``, the first time only."""
        if self._shown:
            return shown
        self._shown = True
        return {name: values + shown[name] for name, values in self._lists.items()}
