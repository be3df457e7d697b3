"""Attention over latents by FlashMLA (package ``sgl-flash-mla``, module ``flash_mla``): of rows
that decode, over pages in bf16 (sm_90), and of tokens whose positions an indexer chose, over pages
in FP8 (sm_90 and sm_100).

An entry of a page in FP8 is byte for byte FlashMLA's for DeepSeek-V3.2 (``formats/kv_format.py``),
and a chosen place indexes its pages, so entries are read where they lie. Attention over all
positions in FP8 takes one scale for all values there, and none of our pages. Lengths and places
stay on the device, where each call plans its launch: a captured step repeats that. The kernels are
those that the package keeps as its legacy ones (``use_legacy``); nothing is compiled. Written for
1.0.0. Not run on a card yet.

N tokens  R decode rows  H heads  C = 512 latent dim  E = 64 rotated dims  Z = C + E
K chosen positions
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formats.kv_format import latent_entry
from ..reference.attention import AttentionRule
from ..reference.paged import PagedBatch
from ..triton.attend_inputs import AttendRows, Keys, Queries, whole_entries
from .library_rows import LibraryRows
from .said_once import SaidOnce
from .sizes import FLASH_MLA_CHOSEN_BLOCK, FLASH_MLA_CHOSEN_HEADS, FLASH_MLA_PAGE, LATENT

_SETTING = "kernels.attention = flashmla"
_ENTRY_BYTES = latent_entry("fp8", *LATENT)[0]


def check_flash_mla(library: Any) -> None:
    """Raises ValueError for a build without the kernels that are used here."""
    has_legacy = getattr(library, "has_legacy", None)
    if has_legacy is None or not has_legacy():
        raise ValueError(
            f"{_SETTING}: the module flash_mla has no legacy kernels; install sgl-flash-mla 1.0.0, or use own"
        )


class FlashMlaRows(LibraryRows):
    """Attention of decode rows. ``library``: the module ``flash_mla``. ``arch``: of the card, 90
    for an H100. ``own``: the attention for what the library does not have; the log says so once
    for each reason.
    """

    def __init__(self, library: Any, arch: int, own: AttendRows) -> None:
        super().__init__(_SETTING, own)
        self._library, self._arch = library, arch

    def supports(self, queries: Queries, keys: Keys, page_size: int, arch: int) -> str:
        """The reason why the library does not attend so; empty: it does."""
        if keys.k1_PKE is None:
            return "heads with keys of their own: only latents"
        dims = queries.q0_THC.shape[2], keys.k1_PKE.shape[2]
        if arch != 90:
            return f"all positions on sm_{arch}: only sm_90"
        if keys.k0.group:
            return "all positions of pages in fp8: it takes one scale for all, and here each has its own"
        if keys.k0.values.dtype != torch.bfloat16 or queries.q0_THC.dtype != torch.bfloat16:
            return "pages or queries that are not bfloat16"
        if dims != LATENT:
            return f"latents of {dims[0]} + {dims[1]} dims: only {LATENT[0]} + {LATENT[1]}"
        if page_size != FLASH_MLA_PAGE:
            return f"pages of {page_size} tokens: only {FLASH_MLA_PAGE}"
        return ""

    def _reason(self, queries: Queries, keys: Keys, batch: PagedBatch) -> str:
        return self.supports(queries, keys, batch.page_size, self._arch) if batch.num_decode else ""

    def _attend(
        self, queries: Queries, keys: Keys, batch: PagedBatch, scale: float, rule: AttentionRule
    ) -> None:
        rows, q1_THE = batch.num_decode, queries.q1_THE
        if not rows:
            return
        assert q1_THE is not None and rule.plain
        entries_PZ = whole_entries(keys)
        plan, _ = self._library.get_mla_metadata()
        out_R1HC, _ = self._library.flash_mla_with_kvcache(
            torch.cat([queries.q0_THC[:rows], q1_THE[:rows]], -1)[:, None],
            entries_PZ.view(-1, FLASH_MLA_PAGE, 1, entries_PZ.shape[1]),
            block_table=batch.pages_RP[:rows],
            cache_seqlens=batch.lengths_R[:rows],
            head_dim_v=LATENT[0],
            tile_scheduler_metadata=plan,
            softmax_scale=scale,
            is_fp8_kvcache=False,
            use_legacy=True,
        )
        queries.out_THC[:rows].copy_(out_R1HC[:, 0])


class FlashMlaChosen:
    """Attention at chosen positions; ``library`` and ``arch`` as for ``FlashMlaRows``."""

    def __init__(self, library: Any, arch: int) -> None:
        self._library, self._arch = library, arch
        self._say = SaidOnce(_SETTING)

    def supports(self, q_THE: Tensor, cache: Tensor, latent_dim: int, top_k: int, arch: int) -> str:
        """The reason why the library does not attend a cache so; empty: it does. q_THE: the rotated
        parts of the queries.
        """
        heads, latent = q_THE.shape[1], (latent_dim, q_THE.shape[2])
        if arch // 10 not in (9, 10):
            return f"sm_{arch}: only sm_90 and sm_100"
        if cache.dtype != torch.uint8:
            return "chosen positions of pages that are not in fp8"
        if q_THE.dtype != torch.bfloat16:
            return f"chosen positions for queries in {q_THE.dtype}: only bfloat16"
        if latent != LATENT:
            return f"latents of {latent[0]} + {latent[1]} dims: only {LATENT[0]} + {LATENT[1]}"
        if heads not in FLASH_MLA_CHOSEN_HEADS:
            return f"chosen positions for {heads} heads: only 64 and 128"
        if top_k % FLASH_MLA_CHOSEN_BLOCK:
            return f"{top_k} chosen positions: only multiples of {FLASH_MLA_CHOSEN_BLOCK}"
        return ""

    def takes(self, q_THE: Tensor, cache: Tensor, latent_dim: int, top_k: int) -> bool:
        """Whether it attends so; the log says once for each reason that it does not."""
        reason = self.supports(q_THE, cache, latent_dim, top_k, self._arch)
        if reason:
            self._say(reason)
        return not reason

    def __call__(
        self,
        q: tuple[Tensor, Tensor],
        cache: Tensor,
        places_NK: Tensor,
        counts_N: Tensor,
        page_size: int,
        scale: float,
    ) -> Tensor:
        """As ``AttendChosen``. A token without positions (padding) gets zeros."""
        order_K = torch.arange(places_NK.shape[1], device=places_NK.device)
        # The kernel of sm_90 counts no positions, so all that are not chosen are -1.
        indices_NK = places_NK.masked_fill(order_K >= counts_N[:, None], -1).to(torch.int32)
        plan, _ = self._library.get_mla_metadata()
        out_N1HC, _ = self._library.flash_mla_with_kvcache(
            torch.cat(q, -1)[:, None],
            cache.view(-1, page_size, 1, _ENTRY_BYTES),
            block_table=None,
            cache_seqlens=None,
            head_dim_v=LATENT[0],
            tile_scheduler_metadata=plan,
            softmax_scale=scale,
            is_fp8_kvcache=True,
            indices=indices_NK[:, None],
            use_legacy=True,
        )
        found: Tensor = out_N1HC[:, 0]
        return found
