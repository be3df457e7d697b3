"""Attention of prompts by FlashAttention-4 (package ``flash-attn-4``, module ``flash_attn.cute``):
grouped queries of the rows after those that decode, over pages in bf16, on sm_90 and sm_100.

Nothing is planned or read on the host: lengths, first tokens and page tables stay on the device.
A kernel is compiled, for seconds, when a kind of call is first met, before a process serves. Calls
for which FlashAttention would compile another one (few tokens, very many rows) are our own
kernel's. A row's queries end where its keys end, as here. In FP8 it takes one scale for a row and
head, so those pages stay ours. Written for 4.0.0b36. Not run on a card yet.

T tokens  R rows  H query heads  K key heads  D head dim
"""

from __future__ import annotations

from typing import Any

import torch

from ..reference.attention import AttentionRule
from ..reference.paged import PagedBatch
from ..triton.attend_inputs import AttendRows, Keys, Queries
from .library_rows import LibraryRows
from .sizes import FLASH_ATTN_4_DIMS

_MOST_ROWS = 256  # with more, its scheduler is another
_TILE = 128  # pairs of token and head of a group; up to one tile its kernel is another


class FlashAttention4(LibraryRows):
    """``library``: the module ``flash_attn.cute``. ``arch``: of the card, 90 for an H100. ``own``:
    the attention for what the library does not have; the log says so once for each reason.
    """

    def __init__(self, library: Any, arch: int, own: AttendRows) -> None:
        super().__init__("kernels.prompt_attention = flash_attn_4", own)
        self._library, self._arch = library, arch

    def supports(self, queries: Queries, keys: Keys, num_rows: int, arch: int) -> str:
        """The reason why the library does not attend rows' queries so; empty: it does."""
        dim, dtype = queries.q0_THC.shape[2], queries.q0_THC.dtype
        dims = FLASH_ATTN_4_DIMS.get(arch // 10)
        if dims is None:
            return f"sm_{arch}: only sm_90 and sm_100 have pages"
        if keys.k0.group:
            return "pages in fp8: it takes one scale for a row and head, and here each entry has its own"
        if keys.k0.values.dtype != torch.bfloat16 or dtype != torch.bfloat16:
            return "pages or queries that are not bfloat16"
        if dim not in dims:
            return f"heads of {dim} dims on sm_{arch}: only {', '.join(map(str, dims))}"
        group = queries.q0_THC.shape[1] // keys.k0.values.shape[1]
        if len(queries.q0_THC) * group <= _TILE:
            return f"steps with prompts of {_TILE // group} tokens or fewer, in all"
        if num_rows > _MOST_ROWS:
            return f"steps of more than {_MOST_ROWS} prompts"
        return ""

    def _reason(self, queries: Queries, keys: Keys, batch: PagedBatch) -> str:
        prompts = _prompts(queries, batch)
        num_rows = len(batch.lengths_R) - batch.num_decode
        if not len(prompts.q0_THC) or not num_rows:
            return ""
        return self.supports(prompts, keys, num_rows, self._arch)

    def _attend(
        self, queries: Queries, keys: Keys, batch: PagedBatch, scale: float, rule: AttentionRule
    ) -> None:
        prompts, first = _prompts(queries, batch), batch.num_decode
        lengths_R = batch.lengths_R[first:]
        if not len(prompts.q0_THC) or not len(lengths_R):
            return
        pages = (-1, batch.page_size, *keys.k0.values.shape[1:])
        out_THD, _ = self._library.flash_attn_varlen_func(
            prompts.q0_THC,
            keys.k0.values.view(pages),
            keys.v.values.view(pages),
            cu_seqlens_q=batch.query_start_R1[first:] - first,
            seqused_k=lengths_R,
            page_table=batch.pages_RP[first:],
            softmax_scale=scale,
            causal=True,
            window_size=(rule.window - 1, None) if rule.window else (None, None),
            learnable_sink=rule.sinks_H,
        )
        prompts.out_THC.copy_(out_THD)


def _prompts(queries: Queries, batch: PagedBatch) -> Queries:
    """The queries of the rows after those that decode."""
    return Queries(queries.q0_THC[batch.num_decode :], None, queries.out_THC[batch.num_decode :])
