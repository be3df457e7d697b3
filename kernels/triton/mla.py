"""Triton column of ``mla.mla_attend``: latent attention, absorbed for decode rows and rows of few
queries, otherwise materialised.

The absorbed form moves queries into the space of latents (a batched product of the library), so
that all heads read one vector per cached token. Rooflines: decode reads each latent once, Z x
itemsize bytes per cached token (656 in FP8), and at 128 heads does 2 H (Z + C) flops for it; in
bf16 that is more than an H200's memory bandwidth allows for. Extends do the same flops per query
and key, 3.4 times those on expanded keys at DeepSeek-V3's sizes, so expansion pays from 171 queries
of a row on (``triton/mla_prefill.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..reference.indexer import blocks_of
from ..reference.paged import PagedBatch, Selection
from .attend import attend_decode, attend_extend
from .attend_inputs import AttendChosen, AttendRows, Keys, Queries, latents_of
from .mla_prefill import Heads, all_expanded, attend_expanded, break_even, plan_windows, window_keys
from .target import check_dtype
from .tiles import Tiles

_CHOSEN_TOKENS = 256  # at once: their queries and sums take 0.2 GiB at 128 heads; not measured


@dataclass(frozen=True)
class LatentAttend:
    """``mla.mla_attend`` with these tiles; ``decode`` as in ``PagedAttend``."""

    tiles: Tiles
    decode: AttendRows = attend_decode

    def __call__(
        self,
        q_nope_THN: Tensor,
        q_rope_THE: Tensor,
        cache: Tensor,
        expand_HPC: Tensor,
        batch: PagedBatch,
        scale: float,
    ) -> Tensor:
        check_dtype(q_nope_THN, "mla_attend: q")
        nope, rope, latent = q_nope_THN.shape[2], q_rope_THE.shape[2], expand_HPC.shape[2]
        most_absorbed = self.tiles.most_absorbed
        if most_absorbed is None:
            most_absorbed = break_even(nope, rope, expand_HPC.shape[1] - nope, latent)
        keys = window_keys(self.tiles.prefill_bytes, expand_HPC)
        windows = plan_windows(batch, len(q_nope_THN), most_absorbed, keys)
        latents = latents_of(cache, latent)
        if windows and all_expanded(batch, most_absorbed):
            out_THV = q_nope_THN.new_empty(*q_nope_THN.shape[:2], expand_HPC.shape[1] - nope)
        else:
            most = most_absorbed if windows else 2**31 - 1
            out_THV = self._absorbed((q_nope_THN, q_rope_THE), latents, expand_HPC, batch, scale, most)
        if windows:
            heads = Heads(q_nope_THN, q_rope_THE, expand_HPC, out_THV)
            attend_expanded(heads, latents, batch, scale, self.tiles, windows)
        return out_THV

    def _absorbed(
        self,
        q: tuple[Tensor, Tensor],
        latents: Keys,
        expand_HPC: Tensor,
        batch: PagedBatch,
        scale: float,
        most_queries: int,
    ) -> Tensor:
        """Returns [T, H, V]; undefined for rows with more than ``most_queries`` queries."""
        (q_nope_THN, q_rope_THE), (num_tokens, num_heads, nope_dim) = q, q[0].shape
        q_HTC = torch.bmm(q_nope_THN.transpose(0, 1), expand_HPC[:, :nope_dim])
        out_HTC = q_nope_THN.new_empty(num_heads, num_tokens, expand_HPC.shape[2])
        queries, tiles = Queries(q_HTC.transpose(0, 1), q_rope_THE, out_HTC.transpose(0, 1)), self.tiles
        eight = bool(latents.k0.group)
        decode = tiles.latent_decode_fp8 if eight else tiles.latent_decode
        self.decode(queries, latents, batch, scale, decode)
        extend = tiles.latent_extend_fp8 if eight else tiles.latent_extend
        attend_extend(queries, latents, batch, scale, extend, most_queries=most_queries)
        return torch.bmm(out_HTC, expand_HPC[:, nope_dim:].transpose(1, 2)).transpose(0, 1)


def attend_chosen(
    attend: AttendChosen,
    q: tuple[Tensor, Tensor],
    cache: Tensor,
    expand_HPC: Tensor,
    selection: Selection,
    scale_and_page: tuple[float, int],
    out_THV: Tensor,
) -> None:
    """Attends the tokens of a selection, absorbed, and writes their rows of out_THV."""
    (q_nope_THN, q_rope_THE), (scale, page_size) = q, scale_and_page
    nope = q_nope_THN.shape[2]
    down_HNC, up_HCV = expand_HPC[:, :nope], expand_HPC[:, nope:].transpose(1, 2)
    for begin, end in blocks_of(0, len(selection.tokens_N), 1, _CHOSEN_TOKENS):
        tokens_N = selection.tokens_N[begin:end]
        q_NHC = torch.bmm(q_nope_THN[tokens_N].transpose(0, 1), down_HNC).transpose(0, 1)
        places_NK, counts_N = selection.places_NK[begin:end], selection.counts_N[begin:end]
        found_NHC = attend((q_NHC, q_rope_THE[tokens_N]), cache, places_NK, counts_N, page_size, scale)
        out_THV[tokens_N] = torch.bmm(found_NHC.transpose(0, 1), up_HCV).transpose(0, 1)
