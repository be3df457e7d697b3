"""Qwen3-MoE (arXiv 2505.09388): grouped-query attention with normalised queries and keys.

T tokens  D hidden  H query heads  K key/value heads  E head dim
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from ...kernels.paged import PagedBatch
from ...kernels.rope import Angles
from ...moe.dispatch import Dispatcher
from .config import GqaConfig, ModelConfig
from .decoder import LayerCache, Linear, MergedLinear, Model, Norm, Placing


class Qwen3Attention(nn.Module):
    """The attention of one layer. Cache: keys and values, each [positions, K, E]."""

    def __init__(self, config: ModelConfig, placing: Placing) -> None:
        super().__init__()
        shape = config.attention
        assert isinstance(shape, GqaConfig)
        self._shape = shape
        self._ops = placing.ops
        queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        parts = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        self.qkv_proj = MergedLinear(config.hidden, parts, placing, shape.bias)
        self.q_norm = Norm(shape.head_dim, config.norm_eps, placing)
        self.k_norm = Norm(shape.head_dim, config.norm_eps, placing)
        self.o_proj = Linear(queries, config.hidden, placing, shape.bias)

    def forward(self, x_TD: Tensor, rotation: Angles, batch: PagedBatch, cache: LayerCache) -> Tensor:
        shape = self._shape
        qkv_TXE = cast(Tensor, self.qkv_proj(x_TD)).unflatten(-1, (-1, shape.head_dim))
        q_THE, k_TKE, v_TKE = qkv_TXE.split([shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], 1)
        k_cache, v_cache = cache
        q_THE = self._ops.rotate_and_write(
            self.q_norm(q_THE), self.k_norm(k_TKE), v_TKE, rotation, (k_cache, v_cache), batch.write_T, interleaved=False
        )
        out_THE = self._ops.attend(q_THE, k_cache, v_cache, batch, shape.head_dim**-0.5)
        return cast(Tensor, self.o_proj(out_THE.flatten(1)))


def build_qwen3_moe(config: ModelConfig, dispatcher: Dispatcher, placing: Placing) -> Model:
    return Model(config, dispatcher, placing, Qwen3Attention)
