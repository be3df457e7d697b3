"""A prompt that is shown before its completion, with the log-probabilities of its tokens."""

from __future__ import annotations

from array import array
from typing import Any

from ...protocol.frontends import HandleLogprobs
from ...protocol.results import PromptLogprobs
from ...text.tokenizer import Codec
from .logprobs import text_logprobs


class Echo:
    """The prompt's part of ``choices[].logprobs`` in a text completion. It grows with each of the
    engine's messages, which are small, so a long prompt never holds up the event loop.

    ``text`` is the prompt as it is shown, and offsets are places in it. Tokens that share a
    character have the same offset.
    """

    def __init__(self, codec: Codec, prompt: list[int], num_top: int, skip_special_tokens: bool) -> None:
        self.text = codec.decode(prompt, skip_special_tokens=skip_special_tokens)
        self._codec = codec
        self._prompt = prompt
        self._num_top = num_top
        self._detokenizer = codec.detokenizer(skip_special_tokens, [])
        self._offset = 0
        self._shown = False
        self._lists: dict[str, list[Any]] = {name: [] for name in text_logprobs(codec, [], [], 0, 0)}
        first = text_logprobs(codec, prompt[:1], [None], 0, 0)
        self._append(first | {"token_logprobs": [None], "top_logprobs": [None]})

    @property
    def known(self) -> int:
        """Number of the prompt's tokens taken so far; the first has no log-probability."""
        return len(self._lists["tokens"])

    @property
    def complete(self) -> bool:
        return self.known == len(self._prompt)

    def take(self, message: PromptLogprobs) -> bool:
        """Takes the new part of a message that leaves no gap. True if it completes the prompt."""
        assert message.position <= self.known, f"position {message.position} after {self.known}"
        chosen = array("f", message.chosen_f32).tolist()
        each = len(message.top_ids_i32) // max(1, len(chosen))
        new = range(self.known - message.position, len(chosen))
        tops = [slice(at * each, (at + 1) * each) for at in new]
        tokens = self._prompt[self.known : self.known + len(new)]
        entries = [
            HandleLogprobs(0, 0, chosen[at], message.top_ids_i32[top], message.top_f32[top])
            for at, top in zip(new, tops, strict=True)
        ]
        self._append(text_logprobs(self._codec, tokens, entries, self._num_top, 0))
        return len(new) > 0 and self.complete

    def before(self, shown: dict[str, Any]) -> dict[str, Any]:
        """Puts the complete prompt before ``shown``, the first time only."""
        if self._shown:
            return shown
        self._shown = True
        return {name: values + shown[name] for name, values in self._lists.items()}

    def _append(self, part: dict[str, Any]) -> None:
        start = self.known
        offsets = []
        for token in self._prompt[start : start + len(part["tokens"])]:
            offsets.append(self._offset)
            self._offset += len(self._detokenizer.push(token))
        for name, values in (part | {"text_offset": offsets}).items():
            self._lists[name] += values
