"""Inputs of paged attention: queries, and keys and values as views of caches in any format.

P positions  H query heads  K key heads
C dims of q0 and k0, and of the values  E further dims of q and k
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..formats.kv_format import GROUP, SCALE_BYTES, num_groups
from ..reference.attention import PLAIN_RULE, AttentionRule
from ..reference.kv_entries import holds_fp8, num_kv_heads
from ..reference.paged import PagedBatch
from .target import power_of_two
from .tiles import AttendTile

ANY_NUMBER = 2**31 - 1


@dataclass(frozen=True)
class Queries:
    """Queries, the width of the values, and the output. Only the last stride of q0_THC and out_THC
    is fixed. q1_THE continues q0 if keys are wider than values (latents), else None.
    """

    q0_THC: Tensor
    q1_THE: Tensor | None
    out_THC: Tensor


@dataclass(frozen=True)
class Values:
    """A cache [positions, K, C] in any dtype. Eight-bit values have ``scales`` float32 [positions,
    K x groups], one for every ``group`` values of a head; otherwise ``group`` is 0 and ``scales``
    is unused.
    """

    values: Tensor
    scales: Tensor
    group: int = 0


@dataclass(frozen=True)
class Keys:
    """k0 and v of every cache position; k1 [positions, 1, E] continues k0. A latent's values are
    its k0; other caches have no k1.
    """

    k0: Values
    k1_PKE: Tensor | None
    v: Values


@dataclass(frozen=True)
class Part:
    """Rows [first, first + rows) of a batch in ``tiles`` tiles per key head."""

    first: int
    rows: int
    tiles: int
    splits: int = 1
    partial_THSC: Tensor | None = None
    logsum_THS: Tensor | None = None
    most_queries: int = ANY_NUMBER


class AttendRows(Protocol):
    """Attends some rows of a batch: those that decode, the first ``num_decode`` rows and tokens, or
    those after them.
    """

    def __call__(
        self,
        queries: Queries,
        keys: Keys,
        batch: PagedBatch,
        scale: float,
        tile: AttendTile,
        rule: AttentionRule = PLAIN_RULE,
    ) -> None: ...


class AttendChosen(Protocol):
    """Attends the latents at chosen positions of a cache. N tokens, K positions for each."""

    def takes(self, q_THE: Tensor, cache: Tensor, latent_dim: int, top_k: int) -> bool:
        """Whether it attends ``top_k`` positions of that cache; q_THE: rotated parts of queries."""
        ...

    def __call__(
        self,
        q: tuple[Tensor, Tensor],
        cache: Tensor,
        places_NK: Tensor,
        counts_N: Tensor,
        page_size: int,
        scale: float,
    ) -> Tensor:
        """Latents [N, H, C], weighted for queries [N, H, C] and [N, H, E], at the first counts_N
        int32 of places_NK int64.
        """
        ...


def heads_of(cache: Tensor, dim: int) -> Values:
    """Keys or values of a cache in any format (``kv_format``)."""
    if not holds_fp8(cache):
        return Values(cache, cache)
    heads = num_kv_heads(cache, dim)
    values = cache[:, : heads * dim].view(torch.float8_e4m3fn).unflatten(1, (heads, dim))
    return Values(values, cache.view(torch.float32)[:, heads * dim // SCALE_BYTES :], power_of_two(dim))


def latents_of(cache: Tensor, latent_dim: int) -> Keys:
    """Latents of a cache in any format, as keys of one head."""
    if not holds_fp8(cache):
        latents = Values(cache[:, None, :latent_dim], cache)
        return Keys(latents, cache[:, None, latent_dim:], latents)
    end = latent_dim + SCALE_BYTES * num_groups(latent_dim)
    values = cache[:, None, :latent_dim].view(torch.float8_e4m3fn)
    latents = Values(
        values,
        cache.view(torch.float32)[:, latent_dim // SCALE_BYTES :],
        min(GROUP, power_of_two(latent_dim)),
    )
    return Keys(latents, cache[:, None, end:].view(torch.bfloat16), latents)


def whole_entries(latents: Keys) -> Tensor:
    """The cache [positions, C + E] of unquantised latents and their rotated parts."""
    values, rotated = latents.k0.values, latents.k1_PKE
    assert rotated is not None and rotated.storage_offset() == values.storage_offset() + values.shape[2]
    return values.as_strided(
        (len(values), values.shape[2] + rotated.shape[2]), (values.stride(0), values.stride(2))
    )
