"""The forward pass of a step on the layers of one rank, at once or as two microbatches.

Suffixes: T tokens of a step, R rows, P pages of the longest row, D hidden.
"""

from __future__ import annotations

import functools

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
        self._parts, self._table, self._history = parts, table, history_i32
        self.kv_share = _kv_share(parts.model.config)

    def run(self, header: Header, rows: Rows, draws: NDArray[np.bool_]) -> Tensor:
        """Hidden states of the step's tokens, [T, D]. Decode rows that do not draw write to the
        scratch page.
        """
        parts, pages_RP = self._parts, self._pages(rows, draws)
        received_TD: Tensor | None = None
        num_tokens = int(rows.counts.sum())
        if not parts.links.stage.first:
            config = parts.model.config
            received_TD = parts.links.receive(header.step, num_tokens, config.hidden, parts.model.dtype)
        if header.microbatches == 1:
            self.announce(num_tokens, header.capacity)
            return self._compute(rows, pages_RP, received_TD, whole(rows))
        capacity = most_tokens(header.capacity)
        pair = halves(rows, capacity, self.kv_share)
        self.announce(max(len(part.tokens) for part in pair), capacity)
        compute = functools.partial(self._compute, rows, pages_RP, received_TD)
        first_TD, second_TD = parts.turns.run(*(functools.partial(compute, part) for part in pair))
        hidden_TD = first_TD.new_empty(num_tokens, first_TD.shape[1])
        for part, part_TD in zip(pair, (first_TD, second_TD), strict=True):
            hidden_TD[torch.from_numpy(part.tokens).to(parts.device)] = part_TD
        return hidden_TD

    def announce(self, num_tokens: int, capacity: int, real_1: Tensor | None = None) -> None:
        """Announces the step, or both microbatches. ``real_1`` as in ``Dispatcher.begin_step``."""
        splits = self._parts.splits
        run = splits.tensor.run_of(num_tokens)
        if real_1 is not None:
            real_1 = real_1 - run.start
        splits.begin_step(capacity)
        self._parts.dispatcher.begin_step(len(run), -(-capacity // splits.tensor.size), real_1)

    def _compute(self, rows: Rows, pages_RP: Int32, received_TD: Tensor | None, part: Part) -> Tensor:
        parts = self._parts
        is_whole = len(part.rows) == len(rows.slots) and len(part.tokens) == int(rows.counts.sum())
        pages = pages_RP if is_whole else pages_RP[part.rows]
        batch, positions_T = build_batch(
            part.starts, part.counts, part.num_decode, pages, parts.pool.page_size, parts.device
        )
        if received_TD is None:
            slots = rows.slots[part.rows]
            owners = slots if part.num_decode == len(slots) else np.repeat(slots, part.counts)
            tokens = self._history[owners, positions_T.cpu().numpy()]
            inputs = torch.from_numpy(tokens.astype(np.int64)).to(parts.device)
        elif is_whole:
            inputs = received_TD
        else:
            inputs = received_TD[torch.from_numpy(part.tokens).to(parts.device)]
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
