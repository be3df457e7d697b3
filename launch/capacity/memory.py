"""Bytes on a rank: weights by kind, KV pages, activations, buffers of the expert exchange."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from ...engine.kv.budget import GPU_RESERVE_BYTES, PoolLimits
from ...engine.models.config import GqaConfig
from ...engine.protocol.buckets import bucket_over, largest_captured, most_tokens
from ...kernels.formats.kv_format import INDEX_BLOCK_BYTES, INDEX_BLOCK_BYTES_CPU, INDEX_SCORE_BYTES
from ...moe.balance.travel import staged_bytes
from ...parallel.deepep_sizes import BufferShape, rounded_capacity
from ...parallel.nccl_ep_sizes import MemoryShape
from ...parallel.stages import PipelineStage
from .setup import ONE_EPOCH, Setup, stored_bytes

_WIDE = 4  # bytes of a value in float32 whatever the model's dtype
_LOGIT_COPIES = 3  # float32: logits, sorted logits, probabilities


@dataclass(frozen=True)
class Weights:
    """Bytes of parameters on a rank.

    Slots of experts, replicas and empty slots are means over the ranks.
    """

    attention: int
    dense: int
    gates: int
    experts: int
    redundant: int
    empty_slots: int
    embeddings: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Memory:
    """Bytes on a rank.

    ``kv_pool``: ``num_pages`` pages and a scratch page. ``activations``: estimated peak at
    ``capacity`` tokens. ``dispatch``: upper bound of the exchange at capacity. ``captured``: both
    once more for captured steps, whose memory is their own. ``moves``: experts on their way between
    ranks. ``reserve``: for libraries. ``headroom``: bytes left; negative:
    bytes missing.
    """

    weights: Weights
    num_pages: int
    kv_pool: int
    activations: int
    dispatch: int
    captured: int
    moves: int
    reserve: int
    headroom: int

    def kv_tokens(self, page_size: int) -> int:
        return self.num_pages * page_size


def memory_of(setup: Setup, stage: PipelineStage) -> Memory:
    """The memory of a rank of ``stage``."""
    weights = weights_of(setup, stage)
    num_pages = pages_of(setup, stage, weights)
    kv_pool = (num_pages + 1) * page_bytes(setup, stage) if num_pages else 0
    steps = _steps(setup, stage)
    moves = moves_bytes(setup, stage)
    reserve = GPU_RESERVE_BYTES if setup.hardware.device == "cuda" else 0
    headroom = setup.rank_memory - weights.total - kv_pool - sum(steps) - moves - reserve
    return Memory(weights, num_pages, kv_pool, *steps, moves, reserve, headroom)


def weights_of(setup: Setup, stage: PipelineStage) -> Weights:
    """Parameters of a rank. A tensor group splits attention and the vocabulary, and dense layers
    unless a dense group does, which splits shared experts too. Gates are whole on every rank.
    """
    shape, tensor, item = setup.shape, setup.mesh.tensor, setup.item
    num_dense = stage.num_layers - stage.num_moe
    slots = stage.num_moe * setup.num_slots * setup.expert_bytes
    places = setup.num_slots * setup.expert_ranks
    redundant = slots * setup.redundant // places
    empty = slots * (places - shape.moe.num_experts - setup.redundant) // places
    table = -(-shape.vocab_size // tensor) * shape.hidden * item
    tables = stage.first + (stage.last and not (stage.first and shape.tie_embeddings))
    absorbed = shape.absorbed_params(tensor)
    indexers = shape.num_indexers(stage.layers)
    linear = stored_bytes(
        shape.split_attention_params(tensor) - absorbed, setup.layer_format(*shape.attention_cuts(tensor))
    )
    dense = stored_bytes(
        shape.dense_params // setup.dense_parts, setup.layer_format(shape.dense_width // setup.dense_parts)
    )
    shared = stored_bytes(
        shape.split_shared_params(setup.shared_parts),
        setup.layer_format(shape.moe.shared_width // setup.shared_parts),
    )
    index = stored_bytes(shape.index_params, setup.layer_format()) + shape.index_norm_params * item
    return Weights(
        attention=stage.num_layers * (linear + (absorbed + shape.norm_params) * item) + indexers * index,
        dense=num_dense * dense + stage.num_moe * shared,
        gates=stage.num_moe * _gate_bytes(setup) + indexers * shape.index_gate_params * _WIDE,
        experts=slots - redundant - empty,
        redundant=redundant,
        empty_slots=empty,
        embeddings=tables * table + stage.last * shape.hidden * item,
    )


def _gate_bytes(setup: Setup) -> int:
    """Bytes of one gate. A GPU holds its weights in the model's dtype, unless the checkpoint has
    them in float32, which its config does not say.
    """
    shape, item = setup.shape, setup.item if setup.hardware.device == "cuda" else _WIDE
    weights = shape.moe.num_experts * shape.hidden
    return weights * item + (shape.gate_params - weights) * _WIDE


def page_bytes(setup: Setup, stage: PipelineStage) -> int:
    shape, kind = setup.shape, setup.kv_dtype
    entries = stage.num_layers * shape.kv_bytes(kind, setup.mesh.tensor)
    return setup.page_size * (entries + shape.num_indexers(stage.layers) * shape.index_key_bytes(kind))


def pages_of(setup: Setup, stage: PipelineStage, weights: Weights) -> int:
    """Pages of the pool; 0 if none fits. A rank on a GPU measures what is estimated here."""
    claimed = sum(_steps(setup, stage)) + moves_bytes(setup, stage)
    limits = PoolLimits(setup.kv_memory, setup.max_running * setup.max_len, claimed)
    free = setup.rank_memory - weights.total
    num_bytes = limits.num_bytes(free, 1, setup.hardware.device)
    return limits.num_pages(num_bytes, page_bytes(setup, stage), setup.page_size)


def _steps(setup: Setup, stage: PipelineStage) -> tuple[int, int, int]:
    """Bytes that steps take: activations and the state of slots, dispatch, captured steps."""
    activations = activations_of(setup, stage) + token_counts_bytes(setup, stage)
    return activations, dispatch_buffers(setup), captured_bytes(setup, stage)


def token_counts_bytes(setup: Setup, stage: PipelineStage) -> int:
    """Bytes of ``engine.rank.device.token_counts``, which a GPU has for penalties."""
    if setup.hardware.device != "cuda" or not stage.last:
        return 0
    item = 2 if 2 * setup.max_len < 2**15 - 1 else 4
    return (setup.max_running + 1) * setup.shape.vocab_size * item


def activations_of(setup: Setup, stage: PipelineStage) -> int:
    """Peak of a layer or of sampling, with the residual stream; experts get their mean load."""
    shape, tensor, item, tokens = setup.shape, setup.mesh.tensor, setup.item, setup.capacity
    residual = 3 * tokens * shape.hidden * item
    heads = shape.attention
    width = heads.num_heads * (
        heads.head_dim if isinstance(heads, GqaConfig) else heads.nope_dim + heads.rope_dim
    )
    blocks = [4 * tokens * width // tensor * item + chosen_bytes(setup)]
    # Tokens of a dense group, there and back: the other ranks' as well.
    group = setup.mesh.dense if setup.mesh.dense > 1 else 0
    gathered = 2 * group * -(-tokens // tensor) * shape.hidden * item
    if stage.num_layers > stage.num_moe:
        wide = gathered if setup.mesh.shares_dense else 0
        blocks.append(3 * tokens * shape.dense_width // tensor * item + wide)
    if stage.num_moe:
        pairs = -(-tokens // tensor) * shape.moe.top_k
        blocks.append(
            pairs * (2 * shape.hidden + 3 * shape.moe.expert_width) * item
            + 3 * tokens * shape.moe.shared_width // tensor * item
            + (gathered if shape.moe.shared_width else 0)
        )
    if stage.last:
        blocks.append(_LOGIT_COPIES * setup.max_running * shape.vocab_size * 4)
    return residual + max(blocks)


def chosen_bytes(setup: Setup) -> int:
    """Bytes of index scores and of the entries that they choose, as many as are made at once; 0
    without an indexer.
    """
    indexer, tokens = setup.shape.indexer, setup.capacity
    if indexer is None:
        return 0
    most = INDEX_BLOCK_BYTES if setup.hardware.device == "cuda" else INDEX_BLOCK_BYTES_CPU
    entries = tokens * indexer.top_k * setup.shape.kv_bytes(setup.kv_dtype)
    return min(tokens * setup.max_len * INDEX_SCORE_BYTES, most) + min(entries, most)


def row_bytes(setup: Setup) -> int:
    """Bytes of a token sent to experts: hidden state and the int32 slots of its experts, or by
    deepep 16 bytes.
    """
    places = 16 if setup.dispatch == "deepep" else 4 * setup.shape.moe.top_k
    return math.ceil(setup.shape.hidden * setup.wire_item) + places


def dispatch_buffers(setup: Setup) -> int:
    """Bytes of an exchange of ``capacity`` tokens per rank; in all_to_all all go to this rank.

    Counts rows sent and received, outputs of their pairs, and outputs that come back. On GPUs sums
    for a token come back.
    """
    moe, ranks, capacity = setup.shape.moe, setup.expert_ranks, bucket_over(setup.capacity)
    tokens = -(-capacity // setup.mesh.tensor)
    row, output = row_bytes(setup), setup.shape.hidden * setup.item
    back = tokens * moe.top_k * output
    if setup.dispatch == "local" or ranks == 1:
        return back
    if setup.dispatch == "all_gather":
        pairs = ranks * tokens * moe.top_k * output
        if setup.hardware.device == "cuda":  # weights travel too; sums return
            return tokens * (row + 4 * moe.top_k) * (1 + ranks) + pairs + (ranks + 1) * tokens * output
        return tokens * row * (1 + ranks) + pairs + back
    if setup.dispatch in ("deepep", "nccl_ep"):
        pairs = setup.num_slots * ranks * rounded_capacity(tokens, ranks)
        return shared_memory(setup) + pairs * (row + output) + tokens * output
    pairs = ranks * tokens * min(moe.top_k, setup.num_slots)
    if setup.hardware.device == "cuda":
        return shared_memory(setup) + pairs * output + back
    return tokens * row * (min(moe.top_k, ranks) + ranks) + pairs * output + back


def captured_bytes(setup: Setup, stage: PipelineStage) -> int:
    """Bytes of captured steps: they share memory, so the largest counts. Stages capture none."""
    if setup.hardware.device != "cuda" or setup.mesh.pipeline > 1:
        return 0
    largest = replace(setup, capacity=largest_captured(setup.max_running, setup.capacity))
    return activations_of(largest, stage) + dispatch_buffers(largest) - shared_memory(largest)


def moves_bytes(setup: Setup, stage: PipelineStage) -> int:
    """Bytes of experts that travel beside the steps, where they are balanced."""
    return staged_bytes(setup.expert_bytes, setup.num_slots, stage.num_moe) if setup.balanced else 0


def shared_memory(setup: Setup) -> int:
    """Bytes at fixed addresses for exchanges within capacity on GPUs, for each microbatch: rows
    received and their outputs, and by all_to_all those that are sent and come back. By deepep and
    nccl_ep once for both microbatches: outputs of all slots for every token of a rank.
    """
    moe, ranks = setup.shape.moe, setup.expert_ranks
    if setup.dispatch not in ONE_EPOCH or setup.hardware.device != "cuda" or ranks == 1:
        return 0
    capacity = bucket_over(setup.capacity)
    microbatches = (capacity, most_tokens(capacity)) if setup.overlap else (capacity,)
    tokens = [-(-most // setup.mesh.tensor) for most in microbatches]
    hidden = math.ceil(setup.shape.hidden * setup.wire_item)
    if setup.dispatch == "deepep":
        return BufferShape(ranks * setup.num_slots, tokens[0], setup.shape.hidden).num_bytes(ranks)
    if setup.dispatch == "nccl_ep":
        slots = ranks * setup.num_slots
        return MemoryShape(slots, moe.top_k, max(1, tokens[0]), setup.shape.hidden).num_bytes(ranks)
    if setup.dispatch == "flashinfer":
        row = hidden + 8 * moe.top_k + setup.shape.hidden * setup.item
        return sum(tokens) * ranks * row
    rows = sum(tokens) * (ranks + min(moe.top_k, ranks)) + len(tokens)
    row = hidden + 8 * min(moe.top_k, setup.num_slots)
    return rows * (row + setup.shape.hidden * setup.item)
