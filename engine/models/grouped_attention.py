"""Grouped-query attention (arXiv 2305.13245), with biases and with norms of queries and keys where
a family has them.
"""

from __future__ import annotations

from torch import nn

from ...kernels.reference.paged import PagedBatch
from ...kernels.reference.rope import Angles, HeadNorms
from ...kernels.reference.sublayers import GroupedHeads, Residual, RowNorm, Step
from .config import GqaConfig, ModelConfig
from .decoder import LayerCache, Linear, MergedLinear, Norm, Placing


class GroupedAttention(nn.Module):
    """The attention of one layer. Cache: keys and values, each [positions, K, E]."""

    def __init__(self, config: ModelConfig, placing: Placing) -> None:
        super().__init__()
        shape = config.attention
        assert isinstance(shape, GqaConfig)
        self._ops = placing.ops
        queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        parts = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        self.qkv_proj = MergedLinear(config.hidden, parts, placing, shape.qkv_bias)
        norms: HeadNorms | None = None
        if shape.qk_norm:
            self.q_norm = Norm(shape.head_dim, config.norm_eps, placing)
            self.k_norm = Norm(shape.head_dim, config.norm_eps, placing)
            norms = HeadNorms(self.q_norm.weight, self.k_norm.weight, config.norm_eps)
        self.o_proj = Linear(queries, config.hidden, placing, shape.out_bias)
        self._heads = GroupedHeads(shape.head_dim, config.rope.interleaved, norms, self.qkv_proj, self.o_proj)

    def forward(
        self, residual: Residual, norm: RowNorm, rotation: Angles, batch: PagedBatch, cache: LayerCache
    ) -> Residual:
        k_cache, v_cache = cache
        return self._ops.attention_sublayer(
            self._ops, residual, norm, self._heads, Step(rotation, batch, (k_cache, v_cache))
        )
