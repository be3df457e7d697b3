"""The capacity plan of a recipe: memory per rank, KV capacity, time floors, and reasons why it does
not fit.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from ...engine.models.shape import read_shape
from ..defaults import CONTEXT
from ..recipe.hardware import hardware_names, load_hardware
from ..recipe.model_folder import description_folder, model_directory
from ..recipe.recipe import Recipe, RecipeError, not_yet
from ..recipe.resolve import check_model
from .floors import Floor, Traffic, decode_work, floor_of, prefill_work, traffic
from .memory import Memory, memory_of, page_bytes
from .setup import Setup, resolve


@dataclass(frozen=True)
class RankCapacity:
    """The equal ranks of a pipeline stage. ``slots``: expert slots per layer."""

    stage: int
    first_rank: int
    last_rank: int
    layers: int
    moe_layers: int
    slots: int
    page_bytes: int
    memory: Memory


@dataclass(frozen=True)
class Phase:
    """Decode or prefill at the plan's context: ``tokens`` per step and data-parallel rank, their
    floor and their exchange.
    """

    tokens: int
    floor: Floor
    traffic: Traffic


@dataclass(frozen=True)
class CapacityPlan:
    """``misfits``: reasons why it does not fit. ``unsupported``: settings that this version refuses
    to launch.
    """

    setup: Setup
    verified: str | None
    ranks: tuple[RankCapacity, ...]
    kv_tokens_per_rank: int
    kv_tokens: int
    longest_context: int
    context: int
    largest_batch_per_rank: int
    largest_batch: int
    decode: Phase
    prefill: Phase
    misfits: tuple[str, ...]
    unsupported: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return not self.misfits

    @property
    def seconds_per_token(self) -> float:
        """Floor of the seconds between two tokens of a request."""
        return self.decode.floor.seconds

    @property
    def seconds_per_1k_prompt(self) -> float:
        """Floor of the seconds for 1,000 prompt tokens if all ranks compute equally many."""
        return 1000 * self.prefill.floor.seconds / self.prefill.tokens

    def to_json(self) -> dict[str, Any]:
        """The answer of ``launch plan --json``: bytes, seconds, exchanges per layer and rank."""
        plan = asdict(self)
        setup = plan.pop("setup")
        model = {name: setup["shape"][name] for name in ("family", "num_layers", "hidden", "max_position")}
        model |= {"parameters": self.setup.shape.total_params, "experts": self.setup.shape.moe.num_experts}
        mesh = self.setup.mesh
        plan["layout"] = {
            "world": mesh.world,
            "pipeline": mesh.pipeline,
            "data": mesh.data,
            "tensor": mesh.tensor,
            "dense": self.setup.dense_parts,
        }
        names = (
            "dispatch",
            "wire",
            "dtype",
            "weights",
            "expert_weights",
            "kv_dtype",
            "page_size",
            "max_running",
            "capacity",
            "redundant",
            "isa",
        )
        plan |= {
            "model": model,
            "hardware": self.setup.hardware.model_dump(),
            "resolved": {name: setup[name] for name in names} | {"spare_data": self.setup.spare_data},
        }
        for rank, held in zip(plan["ranks"], self.ranks, strict=True):
            rank["memory"]["weights"]["total"] = held.memory.weights.total
        for name, phase in (("decode", self.decode), ("prefill", self.prefill)):
            plan[name]["floor"] |= {
                "seconds": phase.floor.seconds,
                "serial": phase.floor.serial,
                "binds": phase.floor.binds,
            }
        plan |= {
            "seconds_per_token": self.seconds_per_token,
            "seconds_per_1k_prompt": self.seconds_per_1k_prompt,
        }
        return {"fits": self.fits, "launches": not self.unsupported} | plan


def plan_recipe(recipe: Recipe, folder: Path, context: int = CONTEXT) -> CapacityPlan:
    """Plans a recipe whose file is in ``folder``, without weights.

    Raises RecipeError when it cannot be planned.
    """
    model = description_folder(recipe, folder)
    try:
        shape = read_shape(model)
    except ValueError as error:
        key = "model.path" if model == model_directory(recipe, folder) else "model.config"
        raise RecipeError(f"{key}: {error}") from None
    if found := check_model(recipe, shape):
        raise RecipeError("\n".join(found))
    name = recipe.cluster.hardware or ("cpu" if recipe.cluster.device == "cpu" else None)
    if name is None:
        known = ", ".join(hardware_names())
        raise RecipeError(
            "cluster.hardware: missing, and a plan needs it; add cluster.hardware=... to the command "
            f"(packaged: {known})"
        )
    hardware = load_hardware(name)
    if recipe.cluster.device not in ("auto", hardware.device):
        raise RecipeError(
            f"cluster.device = {recipe.cluster.device}: cluster.hardware = {name} is {hardware.device}"
        )
    setup = resolve(recipe, shape, hardware)
    return make_plan(setup, recipe, context, tuple(not_yet(recipe)))


def make_plan(setup: Setup, recipe: Recipe, context: int, unsupported: tuple[str, ...]) -> CapacityPlan:
    """Plans a resolved set-up."""
    ranks = tuple(
        RankCapacity(
            stage=stage.index,
            first_rank=setup.mesh.stage_ranks(stage.index)[0],
            last_rank=setup.mesh.stage_ranks(stage.index)[-1],
            layers=stage.num_layers,
            moe_layers=stage.num_moe,
            slots=setup.num_slots,
            page_bytes=page_bytes(setup, stage),
            memory=memory_of(setup, stage),
        )
        for stage in setup.stages()
    )
    pages = min(rank.memory.num_pages for rank in ranks)
    kv_tokens = pages * setup.page_size
    longest = min(setup.max_len, kv_tokens)
    context = min(context, longest) or context
    batch = min(setup.max_running, pages // -(-context // setup.page_size))
    rows = max(1, batch)
    decode = Phase(rows, floor_of(setup, decode_work(rows, context)), traffic(setup, rows))
    prefill = Phase(
        setup.capacity, floor_of(setup, prefill_work(setup.capacity, context)), traffic(setup, setup.capacity)
    )
    return CapacityPlan(
        setup=setup,
        verified=recipe.verified,
        ranks=ranks,
        kv_tokens_per_rank=kv_tokens,
        kv_tokens=kv_tokens * setup.mesh.data,
        longest_context=longest,
        context=context,
        largest_batch_per_rank=batch,
        largest_batch=batch * setup.mesh.data,
        decode=decode,
        prefill=prefill,
        misfits=(
            *_layout_misfits(setup),
            *_memory_misfits(setup, ranks),
            *_length_misfits(recipe, kv_tokens),
        ),
        unsupported=unsupported,
    )


# --------------------------------------------------------------------------- misfits


def _layout_misfits(setup: Setup) -> list[str]:
    here, most = setup.ranks_per_node, setup.hardware.ranks_per_node
    found = []
    if here > most:
        found.append(
            f"cluster.ranks_per_node = {here}: a node of this hardware has {most} devices; "
            f"use {most} and more cluster.nodes"
        )
    if here % setup.mesh.tensor:
        what = (
            f"parallel.tensor = {setup.mesh.tensor}: a tensor group stays on one node, which has {here} ranks"
        )
        found.append(f"{what}; use a divisor of {here}")
    if setup.mesh.dense and here % setup.mesh.dense:
        what = f"parallel.dense = {setup.mesh.dense}: a dense group stays on one node, which has {here} ranks"
        found.append(f"{what}; use a divisor of {here}")
    return found


def _length_misfits(recipe: Recipe, kv_tokens: int) -> list[str]:
    wanted = recipe.model.max_len
    if wanted is None or not kv_tokens or wanted <= kv_tokens:
        return []
    return [
        f"model.max_len is {wanted}, but the KV cache of a rank holds {kv_tokens} tokens: "
        f"lower model.max_len to {kv_tokens} or raise kv_cache.memory"
    ]


def _memory_misfits(setup: Setup, ranks: tuple[RankCapacity, ...]) -> list[str]:
    for rank in ranks:
        memory = rank.memory
        if memory.weights.total + memory.reserve > setup.rank_memory:
            need = size_text(memory.weights.total)
            have = size_text(setup.rank_memory)
            return [f"weights: {need} on a rank that has {have}; {_more_ranks(setup)}"]
        if not memory.num_pages:
            page = f"{rank.page_bytes} bytes ({setup.page_size} tokens)"
            fewer = None if setup.kv_memory is not None else _fitting_capacity(setup)
            way = _more_ranks(setup) if fewer is None else f"use scheduler.max_batch_tokens = {fewer}"
            return [f"kv_cache.memory: holds no page of {page}; {way}"]
        if memory.headroom < 0:
            return [_too_full(setup, rank)]
    return []


def _more_ranks(setup: Setup) -> str:
    """The fewest nodes on which everything fits, if need be with fewer tokens per step."""
    mesh, per_node = setup.mesh, setup.ranks_per_node
    most = setup.shape.moe.num_experts * mesh.pipeline // per_node
    for nodes in range(mesh.world // per_node + 1, most + 1):
        data, rest = divmod(nodes * per_node, mesh.pipeline * mesh.tensor)
        if mesh.dense and data * mesh.tensor % mesh.dense:
            continue
        wider = replace(setup, mesh=msgspec.structs.replace(mesh, data=data))
        capacity = None if rest else _fitting_capacity(wider)
        if capacity is not None:
            fewer = f" and scheduler.max_batch_tokens = {capacity}" if capacity < setup.capacity else ""
            return f"use cluster.nodes = {nodes}{fewer}, or a device with more memory"
    return "more ranks do not help; use a device with more memory"


def _fitting_capacity(setup: Setup) -> int | None:
    """Tokens per step, halved until everything fits; None if no page ever does."""
    tokens = setup.capacity
    while tokens >= setup.max_running:
        held = [memory_of(replace(setup, capacity=tokens), stage) for stage in setup.stages()]
        if all(memory.num_pages and memory.headroom >= 0 for memory in held):
            return tokens
        tokens = 1 << (tokens - 1).bit_length() >> 1
    return None


def _too_full(setup: Setup, rank: RankCapacity) -> str:
    """Advice when weights fit and the rest does not: fewer tokens per step, or fewer pages."""
    memory, fewer = rank.memory, _fitting_capacity(setup)
    ways = [] if fewer is None else [f"scheduler.max_batch_tokens = {fewer}"]
    spare = memory.kv_pool + memory.headroom - rank.page_bytes
    if spare > rank.page_bytes:
        ways.append(f"kv_cache.memory = {spare >> 20}MiB")
    return (
        f"activations {size_text(memory.activations)} and dispatch buffers {size_text(memory.dispatch)} "
        f"at scheduler.max_batch_tokens = {setup.capacity} exceed what weights and pages leave "
        f"by {size_text(-memory.headroom)}; use {' or '.join(ways) or 'more ranks'}"
    )


def size_text(num_bytes: float) -> str:
    """Bytes in the largest unit with a value of at least 1."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if abs(num_bytes) >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes:.0f} B"
