"""Grouped-query attention (arXiv 2305.13245), with biases, norms of queries and keys, sinks and
windows where a family has them.

T tokens  D hidden  H query heads  E values of a head  X values of several heads
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.reference.attention import AttentionRule
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
from ...parallel.tensor import Shard, shard_of
from .attention import Attention, LayerCache
from .config import GqaConfig, ModelConfig
from .norm import Norm


class GroupedAttention(Attention):
    """The attention of one layer, over the last ``window`` positions; 0: all. Cache: keys and
    values, each [positions, K, E].
    """

    def __init__(
        self, config: ModelConfig, backend: Backend[Reference], norm: RowNorm, window: int = 0
    ) -> None:
        super().__init__()
        whole, split = config.attention, backend.tensor
        assert isinstance(whole, GqaConfig) and config.rope.growth is None
        shape = whole.split(split.size)
        copies = max(1, split.size // whole.num_kv_heads)
        q_shard = shard_of(split, 0)
        kv_shard = shard_of(split, 0, copies)
        shards = {"q_proj": q_shard, "k_proj": kv_shard, "v_proj": kv_shard}
        self._ops = backend.ops
        self._norm = norm
        self._dim = shape.head_dim
        self._interleaved = config.rope.interleaved
        self._head_norms: HeadNorms | None = None
        queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        parts = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        self.qkv_proj = MergedLinear(config.hidden, parts, backend, shape.qkv_bias, part_shards=shards)
        self._wide_norms: tuple[Norm, Norm] | None = None
        if shape.qk_norm:
            widths = (queries, keys) if shape.wide_norm else (shape.head_dim, shape.head_dim)
            self.q_norm, self.k_norm = (Norm(width, config.norm_eps, backend) for width in widths)
            if shape.wide_norm:
                self._wide_norms = self.q_norm, self.k_norm
            else:
                self._head_norms = HeadNorms(self.q_norm.weight, self.k_norm.weight, config.norm_eps)
        self._head_shard = q_shard
        self.sinks = backend.parameter(shape.num_heads, dtype=torch.float32) if shape.sinks else None
        self._rule = AttentionRule(window, None if self.sinks is None else self.sinks.data)
        out_shard = shard_of(split, 1)
        self.o_proj = Linear(queries, config.hidden, backend, shape.out_bias, out_shard)
        self._sublayer = self._bind()

    def shards(self) -> dict[str, Shard]:
        return {} if self.sinks is None else {"sinks": self._head_shard}

    def pack(self) -> None:
        self.qkv_proj.pack()
        self.o_proj.pack()
        self._sublayer = self._bind()

    def forward(self, residual: Residual, rotation: Angles, batch: PagedBatch, cache: LayerCache) -> Residual:
        k_cache, v_cache = cache
        return self._sublayer(residual, rotation, batch, (k_cache, v_cache))

    def _bind(self) -> AttentionSublayer:
        qkv = Projection(*self.qkv_proj.operands)
        out = Projection(*self.o_proj.operands)
        heads = GroupedHeads(self._dim, self._interleaved, self._head_norms, qkv, out, self._rule)
        if self._wide_norms is not None:
            return self._with_wide_norms(heads, *self._wide_norms)
        return self._ops.attention_sublayer(self._norm, heads)

    def _with_wide_norms(self, heads: GroupedHeads, q_norm: Norm, k_norm: Norm) -> AttentionSublayer:
        """The sublayer with a norm over all queries of a token and one over all its keys."""
        ops, norm, qkv, out, scale = self._ops, self._norm, heads.qkv, heads.out, heads.dim**-0.5
        num_queries = q_norm.weight.numel()
        num_keys = k_norm.weight.numel()

        def attention(
            residual: Residual, rotation: Angles, batch: PagedBatch, cache: tuple[Tensor, Tensor]
        ) -> tuple[Tensor, Tensor]:
            x_TD, qkv_TX = ops.norm_project(residual, norm, qkv)
            q_TX, k_TX, v_TX = qkv_TX.split([num_queries, num_keys, num_keys], 1)
            qkv_TX = torch.cat([q_norm(q_TX), k_norm(k_TX), v_TX], 1)
            q_THE = ops.norm_rotate_and_write(
                qkv_TX.unflatten(-1, (-1, heads.dim)), None, rotation, cache, batch.write_T, heads.interleaved
            )
            out_THE = ops.attend(q_THE, *cache, batch, scale, heads.rule)
            return x_TD, ops.project(out_THE.flatten(1), out)

        return attention
