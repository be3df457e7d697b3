"""Grouped-query attention (arXiv 2305.13245), with biases and with norms of queries and keys where
a family has them.
"""

from __future__ import annotations

from ...kernels.reference.column import Reference
from ...kernels.reference.paged import PagedBatch
from ...kernels.reference.rope import Angles, HeadNorms
from ...kernels.reference.sublayers import (
    AttentionSublayer,
    GroupedHeads,
    Projection,
    Residual,
    RowNorm,
)
from ...parallel.linear import Backend, Linear, MergedLinear
from ...parallel.tensor import shard_of
from .attention import Attention, LayerCache
from .config import GqaConfig, ModelConfig
from .norm import Norm


class GroupedAttention(Attention):
    """The attention of one layer. Cache: keys and values, each [positions, K, E]."""

    def __init__(self, config: ModelConfig, backend: Backend[Reference], norm: RowNorm) -> None:
        super().__init__()
        whole, split = config.attention, backend.tensor
        assert isinstance(whole, GqaConfig)
        shape = whole.split(split.size)
        copies = max(1, split.size // whole.num_kv_heads)
        q_shard, kv_shard = shard_of(split, 0), shard_of(split, 0, copies)
        shards = {"q_proj": q_shard, "k_proj": kv_shard, "v_proj": kv_shard}
        self._ops = backend.ops
        self._norm = norm
        self._dim = shape.head_dim
        self._interleaved = config.rope.interleaved
        self._head_norms: HeadNorms | None = None
        queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        parts = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        self.qkv_proj = MergedLinear(config.hidden, parts, backend, shape.qkv_bias, part_shards=shards)
        if shape.qk_norm:
            self.q_norm = Norm(shape.head_dim, config.norm_eps, backend)
            self.k_norm = Norm(shape.head_dim, config.norm_eps, backend)
            self._head_norms = HeadNorms(self.q_norm.weight, self.k_norm.weight, config.norm_eps)
        out_shard = shard_of(split, 1)
        self.o_proj = Linear(queries, config.hidden, backend, shape.out_bias, out_shard)
        self._sublayer = self._bind()

    def pack(self) -> None:
        self.qkv_proj.pack()
        self.o_proj.pack()
        self._sublayer = self._bind()

    def forward(self, residual: Residual, rotation: Angles, batch: PagedBatch, cache: LayerCache) -> Residual:
        k_cache, v_cache = cache
        return self._sublayer(residual, rotation, batch, (k_cache, v_cache))

    def _bind(self) -> AttentionSublayer:
        qkv, out = Projection(*self.qkv_proj.operands), Projection(*self.o_proj.operands)
        heads = GroupedHeads(self._dim, self._interleaved, self._head_norms, qkv, out)
        return self._ops.attention_sublayer(self._norm, heads)
