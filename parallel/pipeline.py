"""Pipeline parallelism: hidden states travel from stage to stage, and sampled tokens from the last
stage to the first.

A stage does not wait for the next one: what it sends is on its way while it computes the step of
another cohort. Tokens have a group of their own: NCCL serialises all messages of a group, so that
the hidden states of a step would wait until the tokens of the step before are sampled.
On CPUs messages are told apart by their step, so that one that was never received harms no later
one; on GPUs they arrive in the order in which they are sent.

T tokens of a step  R rows that sample  D hidden
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from .collectives import Collectives, Pending
from .stages import PipelineStage

_MICROBATCHES = 2
_TAGS = 1 << 31  # tags of a transport are 32-bit


class PipelineLinks:
    """The links of one rank to its neighbours: ``hidden`` and ``tokens`` are the groups of the same
    data and tensor index, by stage, in which either travels.
    """

    def __init__(
        self, hidden: Collectives, tokens: Collectives, stage: PipelineStage, device: torch.device
    ) -> None:
        self.stage = stage
        self._hidden, self._tokens = hidden, tokens
        self._device = device
        # Transports read a message after it was sent; this many steps may be on their way.
        self._sent: deque[tuple[Collectives, Pending]] = deque(maxlen=8 * hidden.size)

    @property
    def waited(self) -> float:
        """Seconds that the host spent in waits for other stages."""
        return self._hidden.waited + self._tokens.waited

    @property
    def roles(self) -> tuple[str, str]:
        """The roles of the groups that stages exchange in."""
        return self._hidden.role, self._tokens.role

    def expect(
        self, step: int, num_tokens: int, hidden: int, dtype: torch.dtype, microbatch: int = 0
    ) -> Pending:
        """hidden_TD that the stage before sends, of one microbatch of several."""
        room = torch.empty(num_tokens, hidden, dtype=dtype, device=self._device)
        what = f"hidden states of step {step}"
        if not num_tokens:
            return Pending(what, room, None)
        return self._hidden.receive(room, self._hidden.index - 1, _tag(step, microbatch), what)

    def wait(self, pending: Pending) -> Tensor:
        """The hidden states that are expected. Raises CollectiveError."""
        return self._hidden.wait(pending)

    def send(self, step: int, hidden_TD: Tensor, microbatch: int = 0) -> None:
        """Hands hidden states to the next stage."""
        if len(hidden_TD):
            self._send(self._hidden, hidden_TD, self._hidden.index + 1, _tag(step, microbatch))

    def send_tokens(self, step: int, tokens_R: Tensor) -> None:
        """Hands the tokens that the last stage sampled to the first."""
        if len(tokens_R) and self._tokens.size > 1:
            self._send(self._tokens, tokens_R, 0, _tag(step, 0))

    def expect_tokens(self, step: int, num_rows: int) -> Pending:
        """tokens_R int64 that the last stage will have sampled in ``step``; R is at least 1."""
        room = torch.empty(num_rows, dtype=torch.int64, device=self._device)
        what, last = f"tokens of step {step}", self._tokens.size - 1
        return self._tokens.receive(room, last, _tag(step, 0), what)

    def take_tokens(self, pending: Pending) -> Tensor:
        """The tokens that are expected. Raises CollectiveError."""
        return self._tokens.wait(pending)

    def _send(self, group: Collectives, rows: Tensor, to: int, tag: int) -> None:
        if len(self._sent) == self._sent.maxlen:
            before, pending = self._sent.popleft()
            before.wait(pending)
        self._sent.append((group, group.send(rows.contiguous(), to, tag, f"stage {to}")))

    def forget(self) -> None:
        """Drops what is on its way: the groups it travels in are gone."""
        self._sent.clear()


def _tag(step: int, microbatch: int) -> int:
    return (_MICROBATCHES * step + microbatch) % _TAGS
