"""A recipe resolved for planning: model, hardware, and a value for every ``auto``."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...engine.models.shape import Shape
from ...kernels import cpu_isa
from ...kernels.cpu_isa import Isa
from ...kernels.formats.fp8_format import BLOCK
from ...kernels.formats.kv_format import KvFormat
from ...parallel.mesh import Mesh
from ...parallel.stages import PipelineStage
from ..recipe.hardware import Hardware
from ..recipe.recipe import Recipe
from ..recipe.resolve import balances, dispatch_of, dtype_of, keeps_fp8, kv_format_of, wire_of

ONE_EPOCH = ("all_to_all", "flashinfer", "deepep", "nccl_ep")
"""Exchanges on GPUs through memory at fixed addresses, which serves one epoch of a process."""

_ITEM = {"fp32": 4, "bf16": 2}
# Bytes per value of a matrix: fp8 with a float32 scale per block, NVFP4 with a byte per 16.
_STORED_ROW = 1 + 4 / BLOCK  # fp8 with a float32 scale per block of a row
_STORED = {"fp32": 4.0, "bf16": 2.0, "fp8": 1 + 4 / BLOCK**2, "nvfp4": 0.5 + 1 / 16}


@dataclass(frozen=True)
class Setup:
    """A set-up to plan.

    ``weights``, ``expert_weights``: dtypes of stored matrices. ``dtype``: of activations.
    ``attention_dtype``, ``expert_dtype``: of the arithmetic of attention and with routed experts.
    ``wire``: how hidden states travel to experts, full or fp8; ``wire_item``: bytes per value.
    ``kv_memory``: None is auto. ``capacity``: most tokens of a rank in a step; with
    ``overlap`` it may have two microbatches. ``balanced``: experts move while it serves.
    ``isa``: kind of CPU, None for GPUs.
    """

    shape: Shape
    hardware: Hardware
    mesh: Mesh
    ranks_per_node: int
    dispatch: str
    dtype: str
    weights: str
    expert_weights: str
    attention_dtype: str
    expert_dtype: str
    wire: str
    wire_item: float
    kv_dtype: KvFormat
    page_size: int
    kv_memory: int | None
    max_len: int
    max_running: int
    capacity: int
    overlap: bool
    redundant: int
    balanced: bool
    survivors: bool
    isa: Isa | None

    @property
    def item(self) -> int:
        """Bytes of an activation."""
        return _ITEM[self.dtype]

    @property
    def expert_ranks(self) -> int:
        """Ranks that share the experts of a layer."""
        return self.mesh.experts

    @property
    def num_slots(self) -> int:
        """Expert slots per rank and layer, equal on all ranks: some may stay empty."""
        return -(-(self.shape.moe.num_experts + self.redundant) // self.expert_ranks)

    @property
    def spare_data(self) -> int:
        """Data indices that may be lost while the others go on, as these have slots for every
        expert. 0: serving waits for every replacement.
        """
        restarts = self.hardware.device == "cuda" and self.dispatch in ONE_EPOCH
        if restarts or not self.survivors or self.mesh.shares_dense:
            return 0
        needed = -(-self.shape.moe.num_experts // (self.num_slots * self.mesh.tensor))
        return self.mesh.data - max(1, needed)

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert of one layer, as it is stored."""
        four_bit = self.shape.four_bit
        if four_bit is not None and four_bit.format.name == self.expert_weights:
            matrices = four_bit.format.expert_bytes(self.shape.hidden, self.shape.moe.expert_width)
            return matrices + self.shape.expert_biases * self.item
        return stored_bytes(self.shape.expert_params, self.expert_weights)

    def layer_format(self, *cuts: int) -> str:
        """The format of linear layers whose matrices are cut or stacked after so many rows or
        columns: FP8 if these are whole blocks.
        """
        return self.dtype if any(cut % BLOCK for cut in cuts) else self.weights

    @property
    def dense_parts(self) -> int:
        """Ranks that split a dense layer."""
        return self.mesh.dense or self.mesh.tensor

    @property
    def shared_parts(self) -> int:
        """Ranks that split the shared experts of a layer."""
        return self.mesh.dense or 1

    @property
    def near_ranks(self) -> int:
        """Ranks that share experts and reach each other over the near link."""
        return min(self.expert_ranks, self.linked_ranks)

    @property
    def linked_ranks(self) -> int:
        """Ranks that reach each other over the near link."""
        return self.hardware.near_ranks if self.hardware.device == "cuda" else self.ranks_per_node

    def operations(self, dtype: str) -> float:
        """Operations per second of products with weights in ``dtype``. CPUs that do not multiply
        bf16 widen it and compute in float32.
        """
        widened = self.isa is not None and not cpu_isa.multiplies_bf16(self.isa)
        return self.hardware.operations("fp32" if widened else dtype)

    @property
    def sharing(self) -> int:
        """Ranks per unit of the hardware profile: all of a node on a CPU, one per GPU."""
        return self.ranks_per_node if self.hardware.device == "cpu" else 1

    @property
    def rank_memory(self) -> int:
        """Bytes available to a rank."""
        return self.hardware.memory // self.sharing

    def stages(self) -> list[PipelineStage]:
        return self.shape.stages(self.mesh.pipeline)


def stored_bytes(values: int, dtype: str) -> int:
    """Bytes of a matrix with its scales."""
    return math.ceil(values * _STORED[dtype])


def resolve(recipe: Recipe, shape: Shape, hardware: Hardware) -> Setup:
    """The set-up of a recipe that has passed ``check_model``."""
    dtype = dtype_of(recipe, shape.dtype)
    fp8 = keeps_fp8(recipe, shape.kernel_fp8, hardware.device)
    four_bit = None if shape.four_bit is None else shape.four_bit.format.name
    wire = wire_of(recipe, fp8 and four_bit is None)
    return Setup(
        shape=shape,
        hardware=hardware,
        mesh=recipe.mesh,
        ranks_per_node=recipe.cluster.ranks_per_node,
        dispatch=dispatch_of(recipe, hardware.device),
        dtype=dtype,
        weights="fp8" if fp8 else dtype,
        expert_weights=four_bit or ("fp8" if fp8 else dtype),
        attention_dtype=dtype,
        expert_dtype="fp8" if fp8 else dtype,
        wire=wire,
        wire_item=_STORED_ROW if wire == "fp8" else _ITEM[dtype],
        kv_dtype=kv_format_of(recipe, dtype, hardware.device),
        page_size=recipe.kv_cache.page_size,
        kv_memory=recipe.kv_cache.memory,
        max_len=min(recipe.model.max_len or shape.max_position, shape.max_position),
        max_running=recipe.scheduler.max_running,
        capacity=recipe.scheduler.max_batch_tokens,
        overlap=recipe.overlap != "off",
        redundant=recipe.experts.redundant,
        balanced=balances(recipe),
        survivors=recipe.cluster.survivors == "go_on",
        isa=_isa(recipe, hardware),
    )


def _isa(recipe: Recipe, hardware: Hardware) -> Isa | None:
    """Instructions of the profile's CPU, or of this machine's, limited by the recipe."""
    if hardware.device != "cpu":
        return None
    isa = hardware.isa or cpu_isa.own()
    return isa if recipe.cluster.isa == "auto" else cpu_isa.lesser(isa, recipe.cluster.isa)
