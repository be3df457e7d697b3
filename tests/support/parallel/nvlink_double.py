"""A double of FlashInfer's exchange over NVLink (0.7.4) over gloo: asserts of a call what the
library and its kernels need, and computes its definition on the host.

Nothing says in which order tokens arrive, so the last comes first; rows without a token hold what
no sum survives. Sums of ranks are made as the kernels make them: in float32, by neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lockstep.parallel.collectives import Collectives
from lockstep.parallel.nvlink import RoundShape
from lockstep.parallel.store_ranks import StoreRanks

TOP_K = (1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 18, 22)


@dataclass(frozen=True)
class Result:
    """As ``MoEEpDispatchResult``."""

    hidden_states: Tensor
    topk_ids: Tensor
    topk_weights: Tensor | None
    hidden_states_scale: Tensor | None


class NvlinkDouble:
    """Memories of the ranks of ``collectives``."""

    def __init__(self, collectives: Collectives) -> None:
        self._collectives = collectives
        self.opened: list[RoundsDouble] = []

    def open(self, shape: RoundShape, ranks: StoreRanks, device: torch.device) -> RoundsDouble:
        size = ranks.Get_size()
        assert (ranks.Get_rank(), size) == (self._collectives.index, self._collectives.size)
        assert shape.top_k in TOP_K and shape.num_slots % size == 0 and shape.top_k <= shape.num_slots
        told = ranks.allgather((shape.capacity, shape.hidden, str(shape.dtype), b"handle"))
        assert len(told) == size and all(list(part) == list(told[0]) for part in told)
        assert shape not in [rounds.shape for rounds in self.opened], "it would be the same memory"
        self.opened.append(RoundsDouble(shape, self._collectives))
        return self.opened[-1]


class RoundsDouble:
    """Rounds of tokens, one at a time. ``sent``: how many ranks each token of the last round went
    to.
    """

    def __init__(self, shape: RoundShape, collectives: Collectives) -> None:
        self.shape, self._collectives = shape, collectives
        self._rows = 0
        self._ids_WTK: Tensor | None = None
        self._room = torch.empty(0)
        self.sent: list[int] = []

    def dispatch(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor | None = None,
        *,
        hidden_states_scale: Tensor | None = None,
        runtime_max_tokens_per_rank: int | None = None,
    ) -> Result:
        shape, index, most = self.shape, self._collectives.index, runtime_max_tokens_per_rank
        assert self._ids_WTK is None, "dispatch called twice without an intervening combine"
        assert most is not None and len(topk_ids) <= most <= shape.capacity
        assert topk_ids.dtype == torch.int32 and topk_ids.shape[1] == shape.top_k
        payloads = [hidden_states, topk_ids, topk_weights, hidden_states_scale]
        for payload in payloads:
            assert payload is None or (payload.is_contiguous() and len(payload) == len(topk_ids))
        self._check_rows(hidden_states, hidden_states_scale)
        self._rows = self._collectives.size * most
        ids_WTK = self._gather(topk_ids, most, -1)
        assert int(ids_WTK.max()) < shape.num_slots
        self._ids_WTK = ids_WTK
        self.sent = [len(set(ranks) - {-1}) for ranks in self._ranks(index)[: len(topk_ids)].tolist()]
        arrived = [None if part is None else self._arrived(part, most) for part in payloads]
        tokens, ids, weights, scales = arrived
        assert tokens is not None and ids is not None
        return Result(tokens, ids, weights, scales)

    def get_combine_input_buffer(self, dtype: torch.dtype) -> Tensor:
        assert self._ids_WTK is not None, "called before dispatch"
        self._room = torch.full((self._rows, self.shape.hidden), torch.nan, dtype=dtype)
        return self._room

    def combine(self, expert_output: Tensor, *, output: Tensor | None = None) -> Tensor:
        ids_WTK, index, size = self._ids_WTK, self._collectives.index, self._collectives.size
        assert ids_WTK is not None, "combine called before dispatch"
        assert expert_output.data_ptr() == self._room.data_ptr(), "a copy more"
        assert output is not None and output.dtype == expert_output.dtype == self.shape.dtype
        assert output.shape == (len(self.sent), self.shape.hidden)
        sums_WND = self._gather(expert_output, self._rows, 0)
        for token, ranks in enumerate(self._ranks(index)[: len(output)].tolist()):
            sources = [rank for k, rank in enumerate(ranks) if rank >= 0 and rank not in ranks[:k]]
            found = [sums_WND[rank, self._places(rank)[index][token]].float() for rank in sources]
            output[token] = _by_neighbours(found) if found else 0.0
        self._ids_WTK = None
        assert size == len(ids_WTK)
        return output

    def _check_rows(self, tokens: Tensor, scales: Tensor | None) -> None:
        hidden = self.shape.hidden
        assert tokens.shape[1] == hidden
        if self.shape.eight:
            assert tokens.dtype == torch.uint8 and scales is not None
            assert scales.dtype == torch.float32 and scales.shape[1] == -(-hidden // 128)
        else:
            assert tokens.dtype == self.shape.dtype and scales is None

    def _ranks(self, source: int) -> Tensor:
        """The rank of every choice of the tokens of ``source``, -1 for none."""
        assert self._ids_WTK is not None
        ids_TK = self._ids_WTK[source]
        return torch.where(ids_TK >= 0, ids_TK // (self.shape.num_slots // self._collectives.size), -1)

    def _places(self, rank: int) -> list[dict[int, int]]:
        """For every source, the rows of its tokens on a rank, the last token first."""
        assert self._ids_WTK is not None
        capacity, found = self._ids_WTK.shape[1], []
        for source in range(self._collectives.size):
            tokens = (self._ranks(source) == rank).any(1).nonzero().flatten().tolist()
            found.append({token: source * capacity + row for row, token in enumerate(reversed(tokens))})
        return found

    def _arrived(self, payload: Tensor, most: int) -> Tensor:
        """The rows for this rank of all ranks."""
        empty = -1 if payload.dtype == torch.int32 else 255 if payload.dtype == torch.uint8 else torch.nan
        sent = self._gather(payload, most, 0)
        arrived = torch.full((self._rows, payload.shape[1]), empty, dtype=payload.dtype)
        for source, places in enumerate(self._places(self._collectives.index)):
            for token, row in places.items():
                arrived[row] = sent[source, token]
        return arrived

    def _gather(self, rows: Tensor, most: int, fill: int) -> Tensor:
        """The rows of all ranks, up to ``most`` of each."""
        padded = torch.full((most, rows.shape[1]), fill, dtype=rows.dtype)
        padded[: len(rows)] = rows
        if self._collectives.size == 1:
            return padded[None]
        gathered = self._collectives.wait(self._collectives.all_gather(padded, "rows"))
        return gathered.view(self._collectives.size, most, rows.shape[1])


def _by_neighbours(found: list[Tensor]) -> Tensor:
    while len(found) > 1:
        pairs = zip(found[::2], [*found[1::2], *[torch.zeros(())] * (len(found) % 2)], strict=True)
        found = [left + right for left, right in pairs]
    return found[0]
