"""Multi-head latent attention (arXiv 2405.04434, section 2.1) over a cache of one vector per token,
at the positions that an indexer chooses where a family has one: the layer's, or the last one's.

T tokens  D hidden  H heads  N unrotated dims  E rotated dims  V value dims  C latent dim
P = N + V  Z = C + E
"""

from __future__ import annotations

from torch import Tensor

from ...kernels.reference.column import Reference
from ...kernels.reference.paged import PagedBatch
from ...kernels.reference.rope import Angles
from ...kernels.reference.sublayers import Projection, Residual, RowNorm
from ...parallel.linear import Backend, Linear, Matrix, MergedLinear
from ...parallel.tensor import shard_of
from .attention import Attention, LayerCache
from .config import MlaConfig, ModelConfig
from .indexer import Indexer
from .norm import Norm

# The norms of the latents keep this value whatever ``rms_norm_eps`` says, as in the reference
# implementations.
_LATENT_EPS = 1e-6


class LatentAttention(Attention):
    """The attention of one layer. Cache: the normalised latent beside the rotated key part,
    [positions, Z], and the keys of the layer's indexer if it has one.
    """

    def __init__(self, config: ModelConfig, backend: Backend[Reference], norm: RowNorm, layer: int) -> None:
        super().__init__()
        whole = config.attention_of(layer)
        heads = shard_of(backend.tensor, 0)
        assert isinstance(whole, MlaConfig) and isinstance(config.attention, MlaConfig)
        shape = whole.split(backend.tensor.size)
        self._shape = shape
        self._interleaved = config.rope.interleaved
        self._ops = backend.ops
        self._norm = norm
        queries = shape.num_heads * (shape.nope_dim + shape.rope_dim)
        down = {"q_a_proj": shape.q_latent} if shape.q_latent else {"q_proj": queries}
        down["kv_a_proj_with_mqa"] = shape.kv_latent + shape.rope_dim
        self.down_proj = MergedLinear(
            config.hidden, down, backend, shape.bias, without_bias=("q_proj",), part_shards={"q_proj": heads}
        )
        if shape.q_latent:
            self.q_a_layernorm = Norm(shape.q_latent, _LATENT_EPS, backend)
            self.q_b_proj = Linear(shape.q_latent, queries, backend, shard=heads)
        self.kv_a_layernorm = Norm(shape.kv_latent, _LATENT_EPS, backend)
        expanded = shape.num_heads * (shape.nope_dim + shape.value_dim)
        self.kv_b_proj = Matrix(shape.kv_latent, expanded, backend, heads)
        values, columns = shape.num_heads * shape.value_dim, shard_of(backend.tensor, 1)
        self.o_proj = Linear(values, config.hidden, backend, shape.bias, columns)
        self.indexer: Indexer | None = None
        if shape.indexer is not None:
            assert shape.q_latent is not None, "an indexer reads the latent of the queries"
            self.indexer = Indexer(shape.indexer, config.hidden, shape.q_latent, backend)
        # Plain attributes for ``forward``: finding a submodule or its parameter takes 0.5 us.
        self._bind()
        self._latent_norm = self.kv_a_layernorm.forward
        self._expand_HPC = self.kv_b_proj.weight.unflatten(0, (shape.num_heads, -1))
        self._out = self.o_proj.forward
        self._indexers = (self.indexer,)
        self._sees_chosen = config.attention.indexer is not None

    def _bind(self) -> None:
        self._down = Projection(*self.down_proj.operands)
        self._queries: tuple[RowNorm, Projection] | None = None
        if self._shape.q_latent:
            self._queries = self.q_a_layernorm.row, Projection(*self.q_b_proj.operands)

    def pack(self) -> None:
        self.down_proj.pack()
        if self._shape.q_latent:
            self.q_b_proj.pack()
        if self.indexer is not None:
            self.indexer.pack()
        self.o_proj.pack()
        self._bind()

    def forward(self, residual: Residual, rotation: Angles, batch: PagedBatch, cache: LayerCache) -> Residual:
        if self._sees_chosen:
            return self._forward_selected(residual, rotation, batch, cache)
        ops, (latents,) = self._ops, cache
        x_TD, down_TX = ops.norm_project(residual, self._norm, self._down)
        q_TX, c_TC, k_rope_TE = self._parts(down_TX)
        if self._queries is not None:
            _, q_TX = ops.norm_project((q_TX, None), *self._queries)
        q_THN, q_THE = self._rotate_and_write(q_TX, c_TC, k_rope_TE, rotation, batch, latents)
        out_THV = ops.mla_attend(q_THN, q_THE, latents, self._expand_HPC, batch, self._shape.scale)
        return x_TD, self._out(out_THV.flatten(1))

    def _forward_selected(
        self, residual: Residual, rotation: Angles, batch: PagedBatch, cache: LayerCache
    ) -> Residual:
        ops, (latents, *keys), queries, (indexer,) = self._ops, cache, self._queries, self._indexers
        assert queries is not None
        x_TD, normed_TD = ops.add_norm(residual, self._norm)
        q_TX, c_TC, k_rope_TE = self._parts(ops.project(normed_TD, self._down))
        _, latent_TX = ops.add_norm((q_TX, None), queries[0])
        if indexer is not None:
            batch.selection = indexer.select(normed_TD, latent_TX, rotation, batch, *keys)
        q_TX = ops.project(latent_TX, queries[1])
        q_THN, q_THE = self._rotate_and_write(q_TX, c_TC, k_rope_TE, rotation, batch, latents)
        out_THV = ops.mla_attend_selected(
            q_THN, q_THE, latents, self._expand_HPC, batch, self._shape.scale, batch.selection
        )
        return x_TD, self._out(out_THV.flatten(1))

    def _parts(self, down_TX: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries or their latent, the latent of keys and values, and the rotated part of keys."""
        latent, rotated = self._shape.kv_latent, self._shape.rope_dim
        q_TX, c_TC, k_rope_TE = down_TX.split([down_TX.shape[1] - latent - rotated, latent, rotated], 1)
        return q_TX, c_TC, k_rope_TE

    def _rotate_and_write(
        self,
        q_TX: Tensor,
        c_TC: Tensor,
        k_rope_TE: Tensor,
        rotation: Angles,
        batch: PagedBatch,
        latents: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The two parts of the queries, one rotated; stores this step's latents."""
        shape = self._shape
        if rotation.growth_T1 is not None:
            q_TX = q_TX * rotation.growth_T1.to(q_TX.dtype)
        q_THX = q_TX.unflatten(-1, (shape.num_heads, -1))
        q_nope_THN, q_rope_THE = q_THX.split([shape.nope_dim, shape.rope_dim], -1)
        normed_TC = self._latent_norm(c_TC)
        q_rope_THE = self._ops.rotate_and_write_latent(
            q_rope_THE, normed_TC, k_rope_TE, rotation, latents, batch.write_T, self._interleaved
        )
        return q_nope_THN, q_rope_THE
