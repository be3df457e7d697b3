"""Bytes that a rank holds: weights by kind, pages, activations and the buffers of the expert
exchange.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from ...engine.kv.budget import GPU_RESERVE_BYTES, PoolLimits
from ...engine.models.config import GqaConfig
from ...parallel.stages import PipelineStage
from .setup import Setup, stored_bytes

_GATE_ITEM = 4  # gates are float32 whatever the model's dtype
_LOGIT_COPIES = 3  # float32 logits, the same sorted, and their probabilities


@dataclass(frozen=True)
class Weights:
    """Bytes of parameters on a rank. Slots are counted as experts, replicas and empty ones by their
    mean over the ranks.

    ``packed_copies``: some CPUs hold their expert slots in bf16 twice (``kernels.cpu_isa``).
    """

    attention: int
    dense: int
    gates: int
    experts: int
    redundant: int
    empty_slots: int
    packed_copies: int
    embeddings: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank. ``kv_pool`` is num_pages pages and one for scratch; ``activations`` is an
    estimate of the peak at ``capacity`` tokens; ``dispatch`` bounds the exchange at capacity;
    ``reserve`` is for libraries; ``headroom`` is what is left, below 0 what is missing.
    """

    weights: Weights
    num_pages: int
    kv_pool: int
    activations: int
    dispatch: int
    reserve: int
    headroom: int

    def kv_tokens(self, page_size: int) -> int:
        return self.num_pages * page_size


def memory_of(setup: Setup, stage: PipelineStage) -> Memory:
    """What a rank of ``stage`` holds."""
    weights = weights_of(setup, stage)
    num_pages = pages_of(setup, stage, weights)
    kv_pool = (num_pages + 1) * page_bytes(setup, stage) if num_pages else 0
    activations, dispatch = activations_of(setup, stage), dispatch_buffers(setup)
    reserve = GPU_RESERVE_BYTES if setup.hardware.device == "cuda" else 0
    headroom = setup.rank_memory - weights.total - kv_pool - activations - dispatch - reserve
    return Memory(weights, num_pages, kv_pool, activations, dispatch, reserve, headroom)


def weights_of(setup: Setup, stage: PipelineStage) -> Weights:
    """Parameters of a rank: attention, dense layers and shared experts are split over the tensor
    group, gates are not.
    """
    shape, tensor, item = setup.shape, setup.mesh.tensor, setup.item
    num_dense = stage.num_layers - stage.num_moe
    slot = stored_bytes(shape.expert_params, setup.expert_weights)
    slots = stage.num_moe * setup.num_slots * slot
    places = setup.num_slots * setup.expert_ranks
    redundant = slots * setup.redundant // places
    empty = slots * (places - shape.moe.num_experts - setup.redundant) // places
    table = shape.vocab_size * shape.hidden * item
    tables = stage.first + (stage.last and not (stage.first and shape.tie_embeddings))
    return Weights(
        attention=stage.num_layers
        * (stored_bytes(shape.attention_params // tensor, setup.weights) + shape.norm_params * item),
        dense=stored_bytes(
            (num_dense * shape.dense_params + stage.num_moe * shape.shared_params) // tensor, setup.weights
        ),
        gates=stage.num_moe * shape.gate_params * _GATE_ITEM,
        experts=slots - redundant - empty,
        redundant=redundant,
        empty_slots=empty,
        packed_copies=slots if setup.slots_twice else 0,
        embeddings=tables * table + stage.last * shape.hidden * item,
    )


def page_bytes(setup: Setup, stage: PipelineStage) -> int:
    return setup.page_size * stage.num_layers * setup.shape.kv_bytes(setup.kv_dtype, setup.mesh.tensor)


def pages_of(setup: Setup, stage: PipelineStage, weights: Weights) -> int:
    """Pages of the pool, 0 where not one fits."""
    limits = PoolLimits(setup.kv_memory, setup.max_running * setup.max_len)
    free = setup.rank_memory - weights.total
    num_bytes = limits.num_bytes(free, 1, setup.hardware.device)
    return limits.num_pages(num_bytes, page_bytes(setup, stage), setup.page_size)


def activations_of(setup: Setup, stage: PipelineStage) -> int:
    """The peak within a layer beside the residual stream, or of sampling; experts with their mean
    share of pairs.
    """
    shape, tensor, item, tokens = setup.shape, setup.mesh.tensor, setup.item, setup.capacity
    residual = 3 * tokens * shape.hidden * item
    heads = shape.attention
    width = heads.num_heads * (
        heads.head_dim if isinstance(heads, GqaConfig) else heads.nope_dim + heads.rope_dim
    )
    blocks = [4 * tokens * width // tensor * item]
    if stage.num_layers > stage.num_moe:
        blocks.append(3 * tokens * shape.dense_width // tensor * item)
    if stage.num_moe:
        pairs = -(-tokens // tensor) * shape.moe.top_k
        blocks.append(
            pairs * (2 * shape.hidden + 3 * shape.moe.expert_width) * item
            + 3 * tokens * shape.moe.shared_width // tensor * item
        )
    if stage.last:
        blocks.append(_LOGIT_COPIES * setup.max_running * shape.vocab_size * 4)
    return residual + max(blocks)


def row_bytes(setup: Setup) -> int:
    """A token on the wire: hidden state and int32 places of its experts."""
    return math.ceil(setup.shape.hidden * setup.wire_item) + 4 * setup.shape.moe.top_k


def dispatch_buffers(setup: Setup) -> int:
    """Bytes of an exchange when every rank has ``capacity`` tokens and, in all_to_all, all of them
    want this one's experts: rows sent and received, outputs of their pairs, and those that come
    back.
    """
    moe, ranks = setup.shape.moe, setup.expert_ranks
    tokens = -(-setup.capacity // setup.mesh.tensor)
    row, output = row_bytes(setup), setup.shape.hidden * setup.item
    back = tokens * moe.top_k * output
    if setup.dispatch == "local" or ranks == 1:
        return back
    if setup.dispatch == "all_gather":
        return tokens * row * (1 + ranks) + ranks * tokens * moe.top_k * output + back
    pairs = ranks * tokens * min(moe.top_k, setup.num_slots)
    return tokens * row * (min(moe.top_k, ranks) + ranks) + pairs * output + back
