"""The indexer of DeepSeek's sparse attention (arXiv 2512.02556, section 2.1): chooses the positions
that a layer's attention sees. Every part of split heads holds and computes all of it.

T tokens  D hidden  C values of the query latent  J index heads  I values of an index key
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...kernels.reference.column import Reference
from ...kernels.reference.indexer import IndexNorm
from ...kernels.reference.paged import PagedBatch, Selection
from ...kernels.reference.rope import Angles
from ...parallel.linear import Backend, Linear, Matrix
from .config import IndexerConfig

_KEY_EPS = 1e-6  # whatever ``rms_norm_eps`` says, as in the reference implementations


class KeyNorm(nn.Module):
    """Layer norm of index keys."""

    def __init__(self, dim: int, backend: Backend[Reference]) -> None:
        super().__init__()
        self.weight = backend.parameter(dim)
        self.bias = backend.parameter(dim)
        self.row = IndexNorm(self.weight, self.bias, _KEY_EPS)


class Indexer(nn.Module):
    """Index queries come from the normed latent of the queries, index keys and the weights of heads
    from the normed hidden state; the weights are float32, as gates are. Cache: keys, [positions, 1,
    I].
    """

    def __init__(self, config: IndexerConfig, hidden: int, latent: int, backend: Backend[Reference]) -> None:
        super().__init__()
        self._shape = config
        self._ops = backend.ops
        self.wq_b = Linear(latent, config.num_heads * config.head_dim, backend)
        self.wk = Linear(hidden, config.head_dim, backend)
        self.k_norm = KeyNorm(config.head_dim, backend)
        self.weights_proj = Matrix(hidden, config.num_heads, backend, dtype=torch.float32)
        # Plain attributes for a step: finding a submodule takes 0.5 us.
        self._queries, self._keys = self.wq_b.forward, self.wk.forward
        self._norm, self._weights_JD = self.k_norm.row, self.weights_proj.weight.data

    def pack(self) -> None:
        self.wq_b.pack()
        self.wk.pack()

    def select(
        self, normed_TD: Tensor, latent_TC: Tensor, rotation: Angles, batch: PagedBatch, keys: Tensor
    ) -> Selection | None:
        """Stores this step's keys, and chooses positions; None: all. Scores are compared only, so
        that the constants which scale them are left out.
        """
        q_TJI = self._queries(latent_TC).unflatten(1, (self._shape.num_heads, -1))
        q_TJI = self._ops.rotate_and_write_index(
            q_TJI, self._keys(normed_TD), self._norm, rotation, keys, batch.write_T, self._shape.interleaved
        )
        weights_TJ = nn.functional.linear(normed_TD.float(), self._weights_JD)
        return self._ops.select_positions(q_TJI, weights_TJ, keys, batch, self._shape.top_k)
