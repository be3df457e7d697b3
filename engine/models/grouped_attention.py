"""Grouped-query attention (arXiv 2305.13245), with biases and with norms of queries and keys where a family has them.

T tokens  D hidden  H query heads  K key/value heads  X = H + 2 K  E head dim
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from ...kernels.paged import PagedBatch
from ...kernels.rope import Angles, HeadNorms
from .config import GqaConfig, ModelConfig
from .decoder import LayerCache, Linear, MergedLinear, Norm, Placing


class GroupedAttention(nn.Module):
    """The attention of one layer. Cache: keys and values, each [positions, K, E]."""

    def __init__(self, config: ModelConfig, placing: Placing) -> None:
        super().__init__()
        shape = config.attention
        assert isinstance(shape, GqaConfig)
        self._shape = shape
        self._interleaved = config.rope.interleaved
        self._ops = placing.ops
        queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        parts = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        self.qkv_proj = MergedLinear(config.hidden, parts, placing, shape.qkv_bias)
        self._norms: HeadNorms | None = None
        if shape.qk_norm:
            self.q_norm = Norm(shape.head_dim, config.norm_eps, placing)
            self.k_norm = Norm(shape.head_dim, config.norm_eps, placing)
            self._norms = HeadNorms(self.q_norm.weight, self.k_norm.weight, config.norm_eps)
        self.o_proj = Linear(queries, config.hidden, placing, shape.out_bias)

    def forward(self, x_TD: Tensor, rotation: Angles, batch: PagedBatch, cache: LayerCache) -> Tensor:
        shape = self._shape
        qkv_TXE = cast(Tensor, self.qkv_proj(x_TD)).unflatten(-1, (-1, shape.head_dim))
        k_cache, v_cache = cache
        q_THE = self._ops.norm_rotate_and_write(qkv_TXE, self._norms, rotation, (k_cache, v_cache), batch.write_T, self._interleaved)
        out_THE = self._ops.attend(q_THE, k_cache, v_cache, batch, shape.head_dim**-0.5)
        return cast(Tensor, self.o_proj(out_THE.flatten(1)))
