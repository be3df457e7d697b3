"""Pipeline parallelism: hidden states travel from stage to stage, and sampled tokens from the last
stage to the first.

A stage does not wait for the next one: what it sends is on its way while it computes the step of
another cohort. Messages are told apart by their step, so that one that was never received harms no
later one.

T tokens of a step  R rows that sample  D hidden
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from .collectives import Collectives, Pending
from .stages import PipelineStage

_KINDS = 3  # of messages: tokens, and hidden states of either microbatch
_TOKENS, _HIDDEN = 0, 1
_TAGS = 1 << 31  # tags of a transport are 32-bit


class PipelineLinks:
    """The links of one rank to its neighbours: ``collectives`` are those of the same data and
    tensor index, by stage.
    """

    def __init__(self, collectives: Collectives, stage: PipelineStage, device: torch.device) -> None:
        self.stage = stage
        self._collectives = collectives
        self._device = device
        # Transports read a message after it was sent; this many steps may be on their way.
        self._sent: deque[Pending] = deque(maxlen=8 * collectives.size)

    @property
    def waited(self) -> float:
        """Seconds spent in waits for other stages."""
        return self._collectives.waited

    def receive(self, step: int, num_tokens: int, hidden: int, dtype: torch.dtype) -> Tensor:
        """hidden_TD of the stage before. Raises CollectiveError."""
        return self.wait(self.expect(step, num_tokens, hidden, dtype))

    def expect(
        self, step: int, num_tokens: int, hidden: int, dtype: torch.dtype, microbatch: int = 0
    ) -> Pending:
        """hidden_TD that the stage before sends, of one microbatch of several."""
        room = torch.empty(num_tokens, hidden, dtype=dtype, device=self._device)
        what = f"hidden states of step {step}"
        if not num_tokens:
            return Pending(what, room, None)
        source, tag = self._collectives.index - 1, _tag(step, _HIDDEN + microbatch)
        return self._collectives.receive(room, source, tag, what)

    def send(self, step: int, hidden_TD: Tensor, microbatch: int = 0) -> None:
        """Hands hidden states to the next stage."""
        if len(hidden_TD):
            self._send(hidden_TD, self._collectives.index + 1, _tag(step, _HIDDEN + microbatch))

    def send_tokens(self, step: int, tokens_R: Tensor) -> None:
        """Hands the tokens that the last stage sampled to the first."""
        if len(tokens_R) and self._collectives.size > 1:
            self._send(tokens_R, 0, _tag(step, _TOKENS))

    def expect_tokens(self, step: int, num_rows: int) -> Pending:
        """tokens_R int64 that the last stage will have sampled in ``step``; R is at least 1."""
        room = torch.empty(num_rows, dtype=torch.int64, device=self._device)
        what, last = f"tokens of step {step}", self._collectives.size - 1
        return self._collectives.receive(room, last, _tag(step, _TOKENS), what)

    def wait(self, pending: Pending) -> Tensor:
        return self._collectives.wait(pending)

    def _send(self, rows: Tensor, to: int, tag: int) -> None:
        if len(self._sent) == self._sent.maxlen:
            self._collectives.wait(self._sent.popleft())
        self._sent.append(self._collectives.send(rows.contiguous(), to, tag, f"stage {to}"))

    def forget(self) -> None:
        """Drops what is on its way: the group it travels in is gone."""
        self._sent.clear()


def _tag(step: int, kind: int) -> int:
    return (_KINDS * step + kind) % _TAGS
