"""The forward pass of a step on the layers of one rank, at once or as two microbatches.

Suffixes: T tokens of a step, R rows, P pages of the longest row, D hidden.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...kernels.reference.paged import build_batch
from ..models.config import GqaConfig, ModelConfig
from ..protocol.arrays import Int32
from ..protocol.buckets import most_tokens
from ..protocol.plan import Header
from ..protocol.slot_table import Rows, SlotTable
from .halves import Part, halves, whole
from .parts import Parts


class Forward:
    """Computes hidden states. ``history_i32`` has the tokens of every slot by position.
    ``kv_share``: as ``halves`` takes it.
    """

    def __init__(self, parts: Parts, table: SlotTable, history_i32: Int32) -> None:
        self._parts, self._table, self.history_i32 = parts, table, history_i32
        self.kv_share = _kv_share(parts.model.config)

    def run(self, header: Header, rows: Rows, draws: NDArray[np.bool_]) -> Tensor:
        """Hidden states of the step's tokens, [T, D], handed to the next stage if there is one.
        Decode rows that do not draw write to the scratch page.
        """
        parts, pages_RP = self._parts, self._pages(rows, draws)
        num_tokens = int(rows.counts.sum())
        if header.microbatches == 1:
            self.announce(num_tokens, header.capacity)
            compute = functools.partial(self._compute, rows, pages_RP, whole(rows))
            return self.relay(header.step, num_tokens, 0, compute)
        capacity = most_tokens(header.capacity)
        pair = halves(rows, capacity, self.kv_share)
        self.announce(max(len(part.tokens) for part in pair), capacity)
        computes = [functools.partial(self._compute, rows, pages_RP, part) for part in pair]
        tokens = [torch.from_numpy(part.tokens).to(parts.device) for part in pair]
        return self.relay_both(header.step, tokens, computes)

    def relay_both(
        self, step: int, tokens: Sequence[Tensor], layers: Sequence[Callable[[Tensor | None], Tensor]]
    ) -> Tensor:
        """As ``relay`` for both microbatches, whose ``tokens`` are these of the step."""
        first_TD, second_TD = self._parts.turns.run(
            *(
                functools.partial(self.relay, step, len(indices), number, each)
                for number, (indices, each) in enumerate(zip(tokens, layers, strict=True))
            )
        )
        hidden_TD = first_TD.new_empty(len(first_TD) + len(second_TD), first_TD.shape[1])
        for indices, part_TD in zip(tokens, (first_TD, second_TD), strict=True):
            hidden_TD.index_copy_(0, indices, part_TD)
        return hidden_TD

    def announce(self, num_tokens: int, capacity: int, real_1: Tensor | None = None) -> None:
        """Announces the step, or both microbatches. ``real_1`` as in ``Dispatcher.begin_step``."""
        splits = self._parts.splits
        run = splits.tensor.run_of(num_tokens)
        if real_1 is not None:
            real_1 = real_1 - run.start
        splits.begin_step(capacity)
        self._parts.dispatcher.begin_step(len(run), -(-capacity // splits.tensor.size), real_1)

    def relay(
        self, step: int, num_tokens: int, microbatch: int, layers: Callable[[Tensor | None], Tensor]
    ) -> Tensor:
        """Hidden states of a part: ``layers`` takes those of the stage before, None on the first,
        and the next stage gets the result. The other microbatch has the turn before the wait, and
        one travels on while the other computes.
        """
        parts, links, received_ND = self._parts, self._parts.links, None
        if not links.stage.first:
            config, dtype = parts.model.config, parts.model.dtype
            pending = links.expect(step, num_tokens, config.hidden, dtype, microbatch)
            parts.turns.give()
            received_ND = links.wait(pending)
        hidden_ND = layers(received_ND)
        if not links.stage.last:
            links.send(step, hidden_ND, microbatch)
        return hidden_ND

    def _compute(self, rows: Rows, pages_RP: Int32, part: Part, received_ND: Tensor | None) -> Tensor:
        """``received_ND``: the part's hidden states of the stage before."""
        parts = self._parts
        is_whole = len(part.rows) == len(rows.slots) and len(part.tokens) == int(rows.counts.sum())
        pages = pages_RP if is_whole else pages_RP[part.rows]
        batch, positions_T = build_batch(
            part.starts, part.counts, part.num_decode, pages, parts.pool.page_size, parts.device
        )
        if received_ND is None:
            slots = rows.slots[part.rows]
            owners = slots if part.num_decode == len(slots) else np.repeat(slots, part.counts)
            tokens = self.history_i32[owners, positions_T.cpu().numpy()]
            inputs = torch.from_numpy(tokens.astype(np.int64)).to(parts.device)
        else:
            inputs = received_ND
        hidden_TD: Tensor = parts.model(inputs, positions_T, batch, parts.pool.cache)
        return hidden_TD

    def _pages(self, rows: Rows, draws: NDArray[np.bool_]) -> Int32:
        """The page table of each row."""
        table, pool, slots = self._table, self._parts.pool, rows.slots
        idle = (~draws[: rows.num_decode]).nonzero()[0]
        full = (rows.ends > table.num_pages[slots] * pool.page_size).nonzero()[0]
        assert not len(full) or np.isin(full, idle).all(), (
            f"slots {slots[full].tolist()}: more tokens than pages"
        )
        max_pages = -(-int(rows.ends.max(initial=0)) // pool.page_size)
        pages_RP = table.pages[slots, :max_pages]
        if len(idle):
            pages_RP[idle] = pool.scratch
        return pages_RP


def _kv_share(config: ModelConfig) -> float:
    """Products to attend to one position, in those of all that a token passes."""
    shape, moe = config.attention, config.moe
    if isinstance(shape, GqaConfig):
        projections = 2 * config.hidden * (shape.num_heads + shape.num_kv_heads) * shape.head_dim
        attended = 2 * shape.num_heads * shape.head_dim
    else:
        queries = shape.q_latent or shape.num_heads * (shape.nope_dim + shape.rope_dim)
        outputs = shape.num_heads * shape.value_dim
        projections = config.hidden * (queries + shape.kv_latent + shape.rope_dim + outputs)
        attended = shape.num_heads * (2 * shape.kv_latent + shape.rope_dim)
    experts = 3 * config.hidden * (moe.top_k * moe.expert_width + moe.shared_width)
    return attended / (projections + experts)
