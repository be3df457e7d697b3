"""Triton column of ``attention.attend``: grouped queries over paged keys and values.

Rooflines: decode reads each key and value once, 2 K D x itemsize bytes per cached token (in FP8 2 K
(D + 4)). Extends do 4 H D flops per query and key. A window bounds both.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..reference.attention import PLAIN_RULE, AttentionRule
from ..reference.kv_entries import holds_fp8
from ..reference.paged import PagedBatch
from .attend import attend_decode, attend_extend
from .attend_inputs import AttendRows, Keys, Queries, heads_of
from .target import check_dtype
from .tiles import Tiles


@dataclass(frozen=True)
class PagedAttend:
    """``attention.attend`` with these tiles. ``decode`` attends the rows that decode; our own gives
    zeros for a row of length 0 (padding), others may give any finite numbers. ``extend`` attends
    the rows after them.
    """

    tiles: Tiles
    decode: AttendRows = attend_decode
    extend: AttendRows = attend_extend

    def __call__(
        self,
        q_THD: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        batch: PagedBatch,
        scale: float,
        rule: AttentionRule = PLAIN_RULE,
    ) -> Tensor:
        check_dtype(q_THD, "attend: q")
        k, v = (heads_of(cache, q_THD.shape[2]) for cache in (k_cache, v_cache))
        assert q_THD.shape[1] % k.values.shape[1] == 0
        out_THD = q_THD.new_empty(q_THD.shape)
        queries = Queries(q_THD, None, out_THD)
        keys = Keys(k, None, v)
        tiles = self.tiles
        eight = holds_fp8(k_cache)
        self.decode(queries, keys, batch, scale, tiles.decode_fp8 if eight else tiles.decode, rule)
        self.extend(queries, keys, batch, scale, tiles.extend_fp8 if eight else tiles.extend, rule)
        return out_THD
