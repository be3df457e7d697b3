"""Multi-head latent attention (arXiv 2405.04434, section 2.1) over a cache of one vector per token.

T tokens  D hidden  H heads  N unrotated dims  E rotated dims  V value dims  C latent dim  P = N + V  Z = C + E
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from ...kernels.reference.paged import PagedBatch
from ...kernels.reference.rope import Angles
from ...kernels.reference.sublayers import Residual, RowNorm, add_norm
from .config import MlaConfig, ModelConfig
from .decoder import LayerCache, Linear, Matrix, MergedLinear, Norm, Placing

# The norms of the latents keep this value whatever ``rms_norm_eps`` says, as in the reference
# implementations.
_LATENT_EPS = 1e-6


class LatentAttention(nn.Module):
    """The attention of one layer. Cache: the normalised latent beside the rotated key part,
    [positions, Z].
    """

    def __init__(self, config: ModelConfig, placing: Placing) -> None:
        super().__init__()
        shape = config.attention
        assert isinstance(shape, MlaConfig)
        self._shape = shape
        self._interleaved = config.rope.interleaved
        self._ops = placing.ops
        queries = shape.num_heads * (shape.nope_dim + shape.rope_dim)
        down = {"q_a_proj": shape.q_latent} if shape.q_latent else {"q_proj": queries}
        down["kv_a_proj_with_mqa"] = shape.kv_latent + shape.rope_dim
        self.down_proj = MergedLinear(config.hidden, down, placing, shape.bias, without_bias=("q_proj",))
        if shape.q_latent:
            self.q_a_layernorm = Norm(shape.q_latent, _LATENT_EPS, placing)
            self.q_b_proj = Linear(shape.q_latent, queries, placing)
        self.kv_a_layernorm = Norm(shape.kv_latent, _LATENT_EPS, placing)
        self.kv_b_proj = Matrix(
            shape.kv_latent, shape.num_heads * (shape.nope_dim + shape.value_dim), placing
        )
        self.o_proj = Linear(shape.num_heads * shape.value_dim, config.hidden, placing, shape.bias)

    def forward(
        self, residual: Residual, norm: RowNorm, rotation: Angles, batch: PagedBatch, cache: LayerCache
    ) -> Residual:
        shape = self._shape
        x_TD, normed_TD = add_norm(self._ops, residual, norm)
        down_TX = cast(Tensor, self.down_proj(normed_TD))
        latent_size = shape.kv_latent + shape.rope_dim
        q_TX, c_TC, k_rope_TE = down_TX.split(
            [down_TX.shape[1] - latent_size, shape.kv_latent, shape.rope_dim], 1
        )
        if shape.q_latent:
            q_TX = self.q_b_proj(self.q_a_layernorm(q_TX))
        q_nope_THN, q_rope_THE = q_TX.unflatten(-1, (shape.num_heads, -1)).split(
            [shape.nope_dim, shape.rope_dim], -1
        )
        q_rope_THE = self._ops.rotate_and_write_latent(
            q_rope_THE,
            self.kv_a_layernorm(c_TC),
            k_rope_TE,
            rotation,
            cache[0],
            batch.write_T,
            self._interleaved,
        )
        expand_HPC = self.kv_b_proj.weight.unflatten(0, (shape.num_heads, -1))
        out_THV = self._ops.mla_attend(q_nope_THN, q_rope_THE, cache[0], expand_HPC, batch, shape.scale)
        return x_TD, cast(Tensor, self.o_proj(out_THV.flatten(1)))
