"""The dimensions of a model, the numbers of its parameters, and its stages. No torch here."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from ...kernels.formats.kv_format import KvFormat, entry_bytes, index_entry
from ...parallel.stages import PipelineStage, split_layers
from .config import GqaConfig, IndexerConfig, MlaConfig, ModelConfig, kv_shapes, load_config

SWIGLU = 3  # matrices of a feed-forward block


@dataclass(frozen=True)
class Shape(ModelConfig):
    """A model's config with its parameter counts."""

    @property
    def attention_params(self) -> int:
        """Values in the matrices, biases and sinks of a layer's attention, but an indexer's."""
        shape, hidden = self.attention, self.hidden
        if isinstance(shape, GqaConfig):
            queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
            return (
                hidden * (2 * queries + 2 * keys)
                + shape.qkv_bias * (queries + 2 * keys)
                + shape.out_bias * hidden
                + shape.sinks * shape.num_heads
            )
        queries = shape.num_heads * (shape.nope_dim + shape.rope_dim)
        down = (shape.q_latent or queries) + shape.kv_latent + shape.rope_dim
        up = (
            shape.kv_latent * shape.num_heads * (shape.nope_dim + shape.value_dim)
            + (shape.q_latent or 0) * queries
        )
        biases = shape.bias * (down + hidden)
        return hidden * (down + shape.num_heads * shape.value_dim) + up + biases

    @property
    def indexer(self) -> IndexerConfig | None:
        return self.attention.indexer if isinstance(self.attention, MlaConfig) else None

    def num_indexers(self, layers: Collection[int]) -> int:
        """How many of ``layers`` have an indexer."""
        if self.indexer is None:
            return 0
        return len(layers) - sum(layer in layers for layer in self.indexer.followers)

    @property
    def index_params(self) -> int:
        """Values in the matrices of one indexer, without the weights of its heads."""
        if not isinstance(self.attention, MlaConfig) or self.indexer is None:
            return 0
        queries = (self.attention.q_latent or 0) * self.indexer.num_heads
        return (self.hidden + queries) * self.indexer.head_dim

    @property
    def index_gate_params(self) -> int:
        """Values in the weights of one indexer's heads, which are float32 as gates are."""
        return self.hidden * self.indexer.num_heads if self.indexer is not None else 0

    @property
    def index_norm_params(self) -> int:
        """Values in the norm of one indexer's keys."""
        return 2 * self.indexer.head_dim if self.indexer is not None else 0

    @property
    def norm_params(self) -> int:
        """Values in the norms of one layer, without an indexer's."""
        shape = self.attention
        if isinstance(shape, MlaConfig):
            return 2 * self.hidden + (shape.q_latent or 0) + shape.kv_latent
        heads = shape.num_heads + shape.num_kv_heads if shape.wide_norm else 2
        return 2 * self.hidden + (heads * shape.head_dim if shape.qk_norm else 0)

    @property
    def dense_params(self) -> int:
        """Values in the feed-forward block of a layer without experts."""
        return SWIGLU * self.hidden * self.dense_width

    @property
    def shared_params(self) -> int:
        """Values in the shared experts of one MoE layer, and in the gate of their output."""
        return self.split_shared_params(1)

    def split_shared_params(self, parts: int) -> int:
        """Values in one of ``parts`` of the shared experts of one MoE layer, and in their gate,
        which is whole in each.
        """
        return self.hidden * (SWIGLU * self.moe.shared_width // parts + self.moe.shared_gate)

    @property
    def gate_params(self) -> int:
        """Values in the gate of one MoE layer."""
        biases = self.moe.selection_bias + self.moe.logit_bias
        return self.moe.num_experts * (self.hidden + biases)

    @property
    def expert_params(self) -> int:
        """Values in one expert."""
        return SWIGLU * self.hidden * self.moe.expert_width + self.expert_biases

    @property
    def expert_biases(self) -> int:
        """Values in the biases of one expert."""
        return self.moe.expert_bias * (2 * self.moe.expert_width + self.hidden)

    @property
    def total_params(self) -> int:
        """Values of the whole model."""
        num_moe = len(self.moe_layers)
        per_moe = self.shared_params + self.gate_params + self.moe.num_experts * self.expert_params
        head = self.vocab_size * self.hidden * (1 if self.tie_embeddings else 2) + self.hidden
        layers = self.num_layers * (self.attention_params + self.norm_params)
        each = self.index_params + self.index_gate_params + self.index_norm_params
        layers += self.num_indexers(range(self.num_layers)) * each
        return head + layers + num_moe * per_moe + (self.num_layers - num_moe) * self.dense_params

    @property
    def layer_costs(self) -> tuple[int, ...]:
        """Parameters that a decoded token is multiplied with, by layer; half its operations, but
        for attention's over its context. The last layer's include the output head's.
        """
        moe = self.shared_params + self.gate_params + self.moe.top_k * self.expert_params
        holds_experts = set(self.moe_layers)
        costs = [
            self.attention_params
            + self.num_indexers((layer,)) * (self.index_params + self.index_gate_params)
            + (moe if layer in holds_experts else self.dense_params)
            for layer in range(self.num_layers)
        ]
        costs[-1] += self.vocab_size * self.hidden
        return tuple(costs)

    def stages(self, num_stages: int) -> list[PipelineStage]:
        """The layers by pipeline stage, so that the slowest stage is as fast as it can be. Layers
        stay with the one whose choice of positions they follow.
        """
        followers = () if self.indexer is None else self.indexer.followers
        return split_layers(self.layer_costs, self.moe_layers, num_stages, followers)

    def kv_bytes(self, kv_format: KvFormat, parts: int = 1) -> int:
        """Bytes of KV cache per token and layer in one of ``parts`` that split the heads, without
        the index key.

        Each holds its share of key heads, or the whole latent.
        """
        held = self.attention.split(parts)
        if isinstance(held, MlaConfig):
            held = replace(held, indexer=None)
        return sum(entry_bytes(kv_format, shape) for shape in kv_shapes(held, kv_format))

    def index_key_bytes(self, kv_format: KvFormat) -> int:
        """Bytes of an indexer's key per token, which scores of every position read."""
        if self.indexer is None:
            return 0
        return entry_bytes(kv_format, index_entry(kv_format, self.indexer.head_dim))

    def bound(self, layer: int) -> int:
        """The most positions that the attention of ``layer`` looks at: its window, or those that an
        indexer chooses; 0: all.
        """
        return self.window(layer) or (self.indexer.top_k if self.indexer is not None else 0)

    def split_attention_params(self, parts: int) -> int:
        """Values in the matrices and biases of one layer's attention in one of ``parts``.

        Projections to a latent are whole in each, and so are key heads where there are fewer than
        parts.
        """
        return replace(self, attention=self.attention.split(parts)).attention_params

    def absorbed_params(self, parts: int) -> int:
        """Values of ``split_attention_params`` that attention reads itself, not a linear layer: the
        expansion of the latent.
        """
        held = self.attention.split(parts)
        if isinstance(held, GqaConfig):
            return 0
        return held.kv_latent * held.num_heads * (held.nope_dim + held.value_dim)

    def attention_cuts(self, parts: int) -> tuple[int, ...]:
        """Rows after which matrices of one layer's attention are cut or stacked, in one of
        ``parts``.
        """
        held = self.attention.split(parts)
        if isinstance(held, GqaConfig):
            return held.num_heads * held.head_dim, held.num_kv_heads * held.head_dim
        queries = held.num_heads * (held.nope_dim + held.rope_dim)
        stacked = held.q_latent or queries
        return (stacked, queries, held.num_heads * held.value_dim) if parts > 1 else (stacked,)

    @property
    def index_operations(self) -> int:
        """Operations of an indexer per token and position of its context; the same in every part
        of split heads.
        """
        return 0 if self.indexer is None else 2 * self.indexer.num_heads * (self.indexer.head_dim + 1)

    def attention_operations(self, decode: bool) -> int:
        """Operations per token, position that it looks at and layer.

        In decode, latent attention works on the latent.
        """
        shape = self.attention
        if isinstance(shape, GqaConfig):
            return 4 * shape.num_heads * shape.head_dim
        if decode:
            return 2 * shape.num_heads * (2 * shape.kv_latent + shape.rope_dim)
        return 2 * shape.num_heads * (shape.nope_dim + shape.rope_dim + shape.value_dim)


def read_shape(folder: Path) -> Shape:
    """Reads the model in ``folder``. Raises ValueError with the file and field at fault."""
    return Shape(**vars(load_config(folder)))
