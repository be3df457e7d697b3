"""DeepSeek's sparse attention (arXiv 2512.02556, section 2.1): an indexer scores the positions that
a token may see, and latent attention looks at the best ones only.

The score of a position is the sum over index heads of weight x relu(query . key), in float32. Of
equal scores the earlier position is chosen, so that the choice depends on no layout. A token that
sees no more than ``top_k`` positions looks at all of them; for it nothing is scored.

Published code turns queries and keys by a Hadamard matrix before it rounds them to FP8. Products do
not change by that; here it is left out.

T tokens  N tokens that choose  J index heads  I values of an index key  L positions of a row
K = top_k  H heads  Z values of a latent with its rotated part
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats.kv_format import INDEX_BLOCK_BYTES, INDEX_BLOCK_BYTES_CPU
from .kv_entries import gather_heads, write_heads
from .paged import PagedBatch, Selection, build_batch
from .rope import Angles, rotate_first

# Scores [queries, J, L] in float32 are made for so many queries at once that they take about this
# many bytes; entries gathered for attention likewise.
BLOCK_BYTES = INDEX_BLOCK_BYTES_CPU


@dataclass(frozen=True)
class IndexNorm:
    """Weight and bias [I] of the layer norm of index keys (arXiv 1607.06450)."""

    weight_I: Tensor
    bias_I: Tensor
    eps: float

    def of(self, k_TI: Tensor) -> Tensor:
        """Normed keys in their dtype, computed in float32."""
        weight_I = self.weight_I.float()
        bias_I = self.bias_I.float()
        return F.layer_norm(k_TI.float(), weight_I.shape, weight_I, bias_I, self.eps).to(k_TI.dtype)


def rotate_and_write_index(
    q_TJI: Tensor,
    k_TI: Tensor,
    norm: IndexNorm,
    angles: Angles,
    cache: Tensor,
    write_T: Tensor,
    interleaved: bool = False,
) -> Tensor:
    """Rotates index queries and normed index keys, their first 2 F values, by halves or
    ``interleaved``, and stores the keys at write_T int64 in the cache, [positions, 1, I] or bytes.
    Returns the queries [T, J, I] in their dtype.
    """
    write_heads(cache, write_T, rotate_first(norm.of(k_TI)[:, None], angles, interleaved))
    return rotate_first(q_TJI, angles, interleaved)


def select_positions(
    q_TJI: Tensor, weights_TJ: Tensor, cache: Tensor, batch: PagedBatch, top_k: int
) -> Selection | None:
    """The ``top_k`` best positions of each token that sees more, in a cache that already holds this
    step's index keys, [positions, 1, I] or bytes. weights_TJ float32. None if every token sees
    ``top_k`` or fewer.
    """
    if max(batch.lengths, default=0) <= top_k:
        return None
    tokens = list[Tensor]()
    places = list[Tensor]()
    for row, (begin, length) in enumerate(zip(batch.query_starts, batch.lengths, strict=False)):
        count = batch.query_starts[row + 1] - begin
        first = begin + max(0, top_k - (length - count))
        if first >= begin + count:
            continue
        pages = batch.pages_RP[row, : -(-length // batch.page_size)]
        keys_LI = gather_heads(cache, pages, batch.page_size, q_TJI.shape[2], torch.float32)[:length, 0]
        for start, end in blocks_of(first, begin + count, 4 * q_TJI.shape[1] * length):
            seen_N = torch.arange(length - count + start - begin, length - count + end - begin) + 1
            scores_NL = _scores(q_TJI[start:end], weights_TJ[start:end], keys_LI)
            chosen_NK = best_positions(scores_NL, seen_N.to(scores_NL.device), top_k)
            places.append(pages[chosen_NK // batch.page_size] * batch.page_size + chosen_NK % batch.page_size)
        tokens.append(torch.arange(first, begin + count, device=q_TJI.device))
    rest, rest_tokens = _rest(batch, top_k, q_TJI.device)
    places_NK = torch.cat(places)
    counts_N = torch.full((len(places_NK),), top_k, dtype=torch.int32, device=places_NK.device)
    return Selection(torch.cat(tokens), places_NK, counts_N, rest, rest_tokens)


def best_positions(scores_NL: Tensor, seen_N: Tensor, top_k: int) -> Tensor:
    """The ``top_k`` positions of the highest scores among the first seen_N of each row, ascending,
    int64 [N, min(K, L)]; of equal scores the earlier ones. A score that is no number is the lowest.
    A row that sees fewer has all of them, then zeros. Nothing waits for the device.
    """
    num_rows, length = scores_NL.shape
    positions_L = torch.arange(length, device=scores_NL.device)
    unseen_NL = positions_L >= seen_N[:, None]
    scores_NL = scores_NL.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    scores_NL = scores_NL.masked_fill(unseen_NL, -torch.inf)
    most = min(top_k, length)
    least_N1 = scores_NL.topk(most, 1).values[:, -1:]
    above_NL, equal_NL = scores_NL > least_N1, scores_NL == least_N1
    room_N1 = most - above_NL.sum(1, keepdim=True)
    chosen_NL = (above_NL | (equal_NL & (equal_NL.cumsum(1) <= room_N1))) & ~unseen_NL
    # Chosen positions go to their places in order, all others to a last column that is dropped.
    order_NL = torch.where(chosen_NL, chosen_NL.cumsum(1) - 1, most)
    found = torch.zeros(num_rows, most + 1, dtype=torch.int64, device=scores_NL.device)
    return found.scatter_(1, order_NL, positions_L.expand(num_rows, -1))[:, :most]


def selected_parts(selection: Selection, cache: Tensor) -> Iterator[tuple[Tensor, Tensor, PagedBatch]]:
    """Some tokens at a time, as decode rows over the entries that they look at: the tokens int64, a
    cache of those entries alone, [N * K, ...], and the rows over it, a page each.
    """
    num_chosen, device = selection.places_NK.shape[1], cache.device
    most_bytes = BLOCK_BYTES if device.type == "cpu" else INDEX_BLOCK_BYTES
    row_bytes = num_chosen * cache[0].numel() * cache.itemsize
    for start, end in blocks_of(0, len(selection.tokens_N), row_bytes, most_bytes):
        count = end - start
        batch = PagedBatch(
            num_decode=count,
            page_size=num_chosen,
            query_start_R1=torch.arange(count + 1, dtype=torch.int32, device=device),
            lengths_R=selection.counts_N[start:end],
            pages_RP=torch.arange(count, dtype=torch.int32, device=device)[:, None],
            write_T=torch.zeros(0, dtype=torch.int64, device=device),
            query_starts=tuple(range(count + 1)),
            lengths=(num_chosen,) * count,
        )
        entries = cache.index_select(0, selection.places_NK[start:end].reshape(-1))
        yield selection.tokens_N[start:end], entries, batch


def _scores(q_NJI: Tensor, weights_NJ: Tensor, keys_LI: Tensor) -> Tensor:
    products_NJL = (q_NJI.float().flatten(0, 1) @ keys_LI.T).relu_().unflatten(0, q_NJI.shape[:2])
    return torch.bmm(weights_NJ.float()[:, None], products_NJL)[:, 0]


def _rest(batch: PagedBatch, top_k: int, device: torch.device) -> tuple[PagedBatch | None, Tensor]:
    """The tokens that see no more than ``top_k`` positions, as rows of their own."""
    begins = np.array(batch.query_starts)
    lengths = np.array(batch.lengths)
    counts = np.diff(begins)
    starts = lengths - counts
    left = np.clip(top_k - starts, 0, counts)
    rows = left.nonzero()[0]
    tokens = [np.arange(begins[row], begins[row] + left[row]) for row in rows]
    chosen = torch.from_numpy(np.concatenate(tokens) if tokens else np.zeros(0, np.int64)).to(device)
    if not len(rows):
        return None, chosen
    num_decode = int((rows < batch.num_decode).sum())
    pages = batch.pages_RP.cpu().numpy()[rows]
    rest, _ = build_batch(starts[rows], left[rows], num_decode, pages, batch.page_size, device)
    return rest, chosen


def blocks_of(
    begin: int, end: int, num_bytes: int, most_bytes: int | None = None
) -> Iterator[tuple[int, int]]:
    """Runs of [begin, end) whose members take ``num_bytes`` each, ``most_bytes`` in all, by default
    ``BLOCK_BYTES``.
    """
    step = max(1, (most_bytes or BLOCK_BYTES) // num_bytes)
    return ((start, min(start + step, end)) for start in range(begin, end, step))
