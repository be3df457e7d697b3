"""Time floors: lower bounds of a step's time by compute, memory and network at data-sheet rates.

They assume perfect overlap and even load, so a real engine is slower. All times are seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...moe.config import MoEConfig
from ...parallel.stages import PipelineStage
from .memory import row_bytes, weights_of
from .setup import Setup


@dataclass(frozen=True)
class Work:
    """A step on one data-parallel rank.

    ``tokens``: computed. ``sampled``: rows sampled. ``attended``: positions, summed over tokens.
    ``kv_reads``: positions read from memory. ``routed``: tokens whose experts the rank computes, a
    mean over ranks; equal to ``tokens`` if all ranks have equally many.
    """

    tokens: float
    sampled: float
    attended: float
    kv_reads: float
    routed: float
    decode: bool


@dataclass(frozen=True)
class Traffic:
    """Expert exchange of one layer on one rank: bytes sent over all links, and their time."""

    dispatch_bytes: int
    combine_bytes: int
    dispatch_seconds: float
    combine_seconds: float


@dataclass(frozen=True)
class Floor:
    """Seconds of a step over all stages."""

    compute: float
    memory: float
    network: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.network)

    @property
    def serial(self) -> float:
        """Seconds without overlap of exchange and computation."""
        return max(self.compute, self.memory) + self.network

    @property
    def binds(self) -> str:
        return max(("compute", "memory", "network"), key=lambda name: float(getattr(self, name)))


def decode_work(batch: int, context: int) -> Work:
    """One token for each of ``batch`` requests with ``context`` positions."""
    return Work(batch, batch, batch * context, batch * context, batch, True)


def prefill_work(tokens: int, prompt: int) -> Work:
    """``tokens`` of uncached prompts of ``prompt`` tokens; a chunk reads its context once."""
    return Work(tokens, tokens / prompt, tokens * prompt / 2, tokens + prompt / 2, tokens, False)


def floor_of(setup: Setup, work: Work) -> Floor:
    """The floor of a step: the sum over pipeline stages."""
    parts = [stage_floor(setup, stage, work) for stage in setup.stages()]
    return Floor(*(sum(getattr(part, name) for part in parts) for name in ("compute", "memory", "network")))


def stage_floor(setup: Setup, stage: PipelineStage, work: Work) -> Floor:
    """The floor of one pipeline stage."""
    exchange = traffic(setup, work.tokens)
    network = stage.num_moe * (exchange.dispatch_seconds + exchange.combine_seconds)
    network += _num_gathered(setup, stage) * dense_seconds(setup, work.tokens)
    return Floor(
        setup.sharing * _compute(setup, stage, work), setup.sharing * _memory(setup, stage, work), network
    )


def _compute(setup: Setup, stage: PipelineStage, work: Work) -> float:
    shape, tensor = setup.shape, setup.mesh.tensor
    indexers = shape.num_indexers(stage.layers)
    dense = stage.num_layers * shape.attention_params
    dense += indexers * (shape.index_params + shape.index_gate_params)
    dense += (stage.num_layers - stage.num_moe) * shape.dense_params + stage.num_moe * shape.shared_params
    experts = stage.num_moe * shape.moe.top_k * shape.expert_params
    attended = _seen(setup, stage, work.attended, work.tokens)
    gates = stage.num_moe * shape.moe.num_experts * shape.hidden * work.tokens
    head = stage.last * shape.vocab_size * shape.hidden * work.sampled
    seconds = 2 * work.tokens * dense / tensor / setup.operations(setup.weights)
    seconds += 2 * work.routed * experts / tensor / setup.operations(setup.expert_dtype)
    seconds += attended * attention_seconds(setup, work.decode)
    seconds += indexers * work.attended * index_seconds(setup)
    return seconds + 2 * (gates + head) / setup.operations(setup.dtype)


def _memory(setup: Setup, stage: PipelineStage, work: Work) -> float:
    """Weights are read once per step, of experts those that get a token.

    Replicas share the tokens and add no reads.
    """
    shape, moe = setup.shape, setup.shape.moe
    weights = weights_of(setup, stage)
    chosen: float = 1 - (1 - moe.top_k / moe.num_experts) ** (work.routed * setup.mesh.data)
    head = stage.last * shape.vocab_size * shape.hidden * setup.item
    kv = _seen(setup, stage, work.kv_reads, work.tokens) * read_seconds(setup)
    kv += shape.num_indexers(stage.layers) * work.kv_reads * index_read_seconds(setup)
    read = weights.attention + weights.dense + weights.gates + chosen * weights.experts + head
    return read / (1e12 * setup.hardware.memory_tb_s) + kv


def attention_seconds(setup: Setup, decode: bool) -> float:
    """Seconds for a token to attend to one position in one layer, before ``sharing``."""
    operations = setup.shape.attention_operations(decode)
    return operations / setup.mesh.tensor / setup.operations(setup.attention_dtype)


def read_seconds(setup: Setup) -> float:
    """Seconds to read one position in one layer, without its index key, before ``sharing``."""
    shape, kind = setup.shape, setup.kv_dtype
    return shape.kv_bytes(kind, setup.mesh.tensor) / (1e12 * setup.hardware.memory_tb_s)


def index_seconds(setup: Setup) -> float:
    """Seconds for an indexer to score one position for a token, before ``sharing``."""
    return setup.shape.index_operations / setup.operations(setup.attention_dtype)


def index_read_seconds(setup: Setup) -> float:
    """Seconds to read one index key, before ``sharing``."""
    return setup.shape.index_key_bytes(setup.kv_dtype) / (1e12 * setup.hardware.memory_tb_s)


def bounds_of(setup: Setup, stage: PipelineStage) -> list[int]:
    """The most positions that a token attends to, for each layer of a stage that bounds them."""
    return [bound for layer in stage.layers if (bound := setup.shape.bound(layer))]


def _seen(setup: Setup, stage: PipelineStage, positions: float, tokens: float) -> float:
    """``positions`` over the layers of a stage, some of which bound those of each token."""
    bounds = bounds_of(setup, stage)
    whole = (stage.num_layers - len(bounds)) * positions
    return whole + sum(min(positions, tokens * bound) for bound in bounds)


# --------------------------------------------------------------------------- network


def traffic(setup: Setup, num_tokens: float) -> Traffic:
    """The exchange of one MoE layer when every data-parallel rank has ``num_tokens`` tokens.

    all_to_all, flashinfer, nccl_ep: a token goes once to every rank with one of its experts.
    deepep: once for each expert. all_gather: every token goes to every rank. On GPUs a rank returns
    the sum of a token's outputs; on CPUs, by deepep and by nccl_ep, one per expert. Other systems:
    by_pair is all_to_all with an output per expert on GPUs too; in two_level a token goes once to
    every node, is passed on inside it, and returns summed per node.
    """
    ranks, near = setup.expert_ranks, setup.near_ranks
    if ranks == 1 or setup.dispatch == "local":
        return Traffic(0, 0, 0.0, 0.0)
    tokens = num_tokens / setup.mesh.tensor
    top_k, row, output = setup.shape.moe.top_k, row_bytes(setup), setup.shape.hidden * setup.item
    near_share = (near - 1) / ranks
    far_share = (ranks - near) / ranks
    sums = setup.hardware.device == "cuda"
    if setup.dispatch == "all_gather":
        away = (near - 1.0, (ranks - near) / near)
        back = away if sums else (away[0] * top_k, away[1] * top_k)
    else:
        copies = top_k if setup.dispatch == "deepep" else distinct(setup.shape.moe, ranks)
        num_back = copies if sums and setup.dispatch not in ("by_pair", "nccl_ep") else top_k
        away = (copies * near_share, copies * far_share)
        back = (num_back * near_share, num_back * far_share)
        if setup.dispatch == "two_level":
            nodes = ranks / near
            far = distinct(setup.shape.moe, nodes) * (nodes - 1) / nodes
            away = (copies * (near - 1) / near, far)
            back = (top_k * (near - 1) / near, far)
    sent = [tokens * row * part for part in away]
    returned = [tokens * output * part for part in back]
    return Traffic(int(sum(sent)), int(sum(returned)), _exchange(setup, *sent), _exchange(setup, *returned))


def _num_gathered(setup: Setup, stage: PipelineStage) -> int:
    """Blocks of a stage around which a dense group exchanges tokens."""
    layers = stage.num_layers - stage.num_moe if setup.mesh.shares_dense else 0
    return layers + (stage.num_moe if setup.shape.moe.shared_width else 0)


def dense_seconds(setup: Setup, num_tokens: float) -> float:
    """Seconds of the exchange around one dense block, there and back, when every data-parallel rank
    has ``num_tokens`` tokens: a rank sends its own to all others of its dense group, and gets their
    sums.
    """
    size = setup.mesh.dense
    if size <= 1:
        return 0.0
    near = min(size, setup.linked_ranks)
    sent = num_tokens / setup.mesh.tensor * setup.shape.hidden * setup.item
    return 2 * _exchange(setup, sent * (near - 1), sent * (size - near) / near)


def _exchange(setup: Setup, near: float, far: float) -> float:
    """Seconds of an exchange that uses both links at once."""
    hardware = setup.hardware
    return (
        max(near / (1e9 * hardware.near_gb_s), far / (1e9 * hardware.far_gb_s)) + 1e-6 * hardware.latency_us
    )


def distinct(moe: MoEConfig, units: float) -> float:
    """Mean number of ``units`` (ranks or nodes with equal shares of experts) that a token needs.

    Assumes a uniform choice of experts, within ``top_groups`` of their groups if there are groups.
    """
    groups, chosen = moe.num_groups, moe.top_groups
    if groups == 1:
        return units * (1 - _missed(moe.num_experts, moe.num_experts / units, moe.top_k))
    if units <= groups:
        return units * (1 - _missed(groups, groups / units, chosen))
    per_group = units / groups
    size = moe.num_experts / groups
    return chosen * per_group * (1 - _missed(size, size / per_group, round(moe.top_k / chosen)))


def _missed(total: float, part: float, picks: int) -> float:
    """Probability that ``picks`` distinct ones of ``total`` all lie outside a ``part`` of them."""
    missed = 1.0
    for pick in range(picks):
        missed *= max(0.0, (total - part - pick) / (total - pick))
    return missed
