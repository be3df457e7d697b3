"""The rank process: loads its shard, sizes its page pool, and executes plans until told to stop."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from ...kernels.formats.fp8_format import BLOCK
from ...kernels.formats.kv_format import parse_format
from ...kernels.table import column_for, ops_of, with_libraries
from ...moe.balance.placement import Placement
from ...moe.balance.start import placement_of
from ...moe.balance.travel import staged_bytes
from ...moe.dispatch.dispatcher import Dispatcher
from ...parallel.collectives import Collectives
from ...parallel.dense import split_as_attention, split_over
from ...parallel.microbatches import Turns
from ...parallel.pipeline import PipelineLinks
from ...parallel.rank_groups import EpochGroup, RankGroups
from ...parallel.stages import PipelineStage
from ...parallel.tensor import UNSPLIT, TensorGroup
from ..kv.budget import PoolLimits
from ..models.checkpoint_reader import CheckpointReader
from ..models.config import ModelConfig, load_config
from ..models.decoder import Model
from ..models.random_tensors import RandomTensors
from ..models.registry import ModelPart, build_model
from ..models.shape import read_shape
from ..models.tensor_source import TensorSource
from ..models.weights import load_weights
from ..protocol.lobby import Lobby
from ..protocol.specs import RankSpec
from ..text.vocabulary import load_vocabulary
from .device.executor import DeviceExecutor
from .device.graphs import CudaRecorder
from .device.rehearsal import CudaMemory, rehearse
from .dispatch import build_dispatcher
from .executor import Executor
from .expert_slots import ExpertSlots, StagePlace
from .grammars import Grammars
from .loop import RankLoop
from .meeting_store import MeetingStore
from .page_pool import KVPool, entries_of, fit_pages, room_for_weights
from .parts import Parts
from .progress import RankProgress
from .pulse import Pulse
from .sockets import RankSockets
from .warm_up import Pages, warm_up

_LOG = logging.getLogger(__name__)

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def main(spec: RankSpec) -> None:
    """Runs rank ``spec.rank`` until the controller says Stop. Any other end is an exception, which
    its process reports.
    """
    torch.set_num_threads(spec.threads)
    with Lobby(spec.lobby, "rank", spec.rank) as lobby:
        lobby.report("starting")
        progress = RankProgress(lobby)
        if spec.device == "cpu":
            config = load_config(Path(spec.model_path))
            pages = Pages(parse_format(spec.kv_dtype), spec.page_size)
            warm_up(
                config,
                _dtype(spec.dtype),
                pages,
                functools.partial(_alone, spec),
                progress.tell,
            )
        executor = load_executor(spec, progress.loaded, progress.tell)
        sockets = RankSockets(spec, absence=spec.pause_deadline)
        try:
            hello = executor.hello()
            progress.ready(f"{hello.num_pages} pages of {hello.page_size} tokens")
            loop = RankLoop(spec.rank, executor, sockets)
            cuts = executor.cut, executor.cut_overdue
            with Pulse(spec, loop, os._exit, *cuts):
                reason = loop.run()
            lobby.report("stopped", reason)
        finally:
            sockets.close()
            executor.close()


def load_executor(
    spec: RankSpec, progress: Callable[[float], None], tell: Callable[[str], None] = lambda text: None
) -> Executor:
    """Loads this rank's weights and allocates its memory: on a GPU pages take the rest, once steps
    have been rehearsed. ``tell`` as in ``Parts``. Raises ValueError when checkpoint, mesh or memory
    do not fit.
    """
    device = torch.device(spec.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # sets it for this thread, which launches everything
    config = read_shape(Path(spec.model_path))
    parts = replace(_load_parts(spec, progress), tell=tell)
    max_len = min(spec.max_len or config.max_position, config.max_position)
    claimed = _travelling(parts.dispatcher.placement, parts.expert_bytes) if spec.balance else 0
    if parts.device.type == "cuda":
        claimed += rehearse(lambda: _device_executor(parts, spec, max_len), CudaMemory(parts.device))
    limits = PoolLimits(spec.kv_memory, spec.max_running * max_len, claimed)
    num_pages = fit_pages(parts.pool.page_bytes, spec.page_size, limits, spec.ranks_per_host, parts.device)
    where, held = (spec.rank, spec.mesh.world, parts.device), (spec.dtype, num_pages, spec.kv_dtype)
    said = "loaded %s: rank %d of %d on %s, %s, %d pages in %s, experts by %s"
    _LOG.info(said, spec.model_path, *where, *held, spec.dispatch)
    pool = _pool(spec, config, parts.links.stage, num_pages)
    return _executor(replace(parts, pool=pool), spec, max_len)


def _load_parts(spec: RankSpec, progress: Callable[[float], None]) -> Parts:
    """The parts of this rank with its weights, and a pool without pages."""
    mesh = spec.mesh
    device = torch.device(spec.device)
    config = read_shape(Path(spec.model_path))
    here = mesh.coordinates(spec.rank)
    stage = config.stages(mesh.pipeline)[here.stage]
    whole = placement_of(spec.placement_i32, len(config.moe_layers), config.moe.num_experts, mesh.experts)
    here_layers = _moe_layers(config, stage)
    placement = Placement(whole.experts_LWS[here_layers.start : here_layers.stop], whole.num_experts)
    experts, tensor, dense, stages, tokens, moves = _groups(spec, device)
    turns = Turns()
    split = UNSPLIT if mesh.tensor == 1 else TensorGroup(tensor, turns.give)
    splits = split_as_attention(split) if dense.size == 1 else split_over(dense, split, turns.give)
    dtype = _dtype(spec.dtype)
    dispatcher, memory = build_dispatcher(spec, config.moe, dtype, placement, experts, turns)
    part = ModelPart(stage, splits)
    model = _load_model(
        spec, config, dispatcher, part, lambda layer: placement.experts_of(here.expert, layer), progress
    )
    spread: list[EpochGroup] = [experts]
    if spec.balance:
        spread.append(moves)
    if memory is not None:
        spread.append(memory)
    grammars = _grammars(spec, config) if mesh.samples(spec.rank) else None
    slots = None
    if mesh.experts > 1:
        place = StagePlace(here.stage, here.expert, here_layers)
        slots = ExpertSlots(model, dispatcher, whole, place, moves, _source(spec))
    return Parts(
        rank=spec.rank,
        model=model,
        dispatcher=dispatcher,
        groups=RankGroups(tensor, dense, stages, tokens, *spread, experts=spread),
        splits=splits,
        links=PipelineLinks(stages, tokens, stage, device),
        turns=turns,
        samples=mesh.samples(spec.rank),
        pool=_pool(spec, config, stage, 0),
        device=device,
        expert_bytes=_expert_bytes(config, dtype, spec.keep_fp8),
        slots=slots,
        grammars=grammars,
    )


def _load_model(
    spec: RankSpec,
    config: ModelConfig,
    dispatcher: Dispatcher,
    part: ModelPart,
    experts_of_layer: Callable[[int], list[int]],
    progress: Callable[[float], None],
) -> Model:
    device = torch.device(spec.device)
    with room_for_weights(device):
        ops = with_libraries(ops_of(column_for(device)), spec.libraries, device)
        model = build_model(config, dispatcher, _dtype(spec.dtype), device, ops, spec.keep_fp8, part)
        load_weights(model, _source(spec), experts_of_layer, progress)
        model.pack()
    return model


def _source(spec: RankSpec) -> TensorSource:
    if spec.weights == "random":
        return RandomTensors(torch.device(spec.device))
    return CheckpointReader(Path(spec.model_path))


def _travelling(placement: Placement, expert_bytes: int) -> int:
    """Bytes of experts on the move, at most."""
    num_layers, num_ranks, num_slots = placement.experts_LWS.shape
    if num_ranks == 1:
        return 0
    return staged_bytes(expert_bytes, num_slots, num_layers)


def _pool(spec: RankSpec, config: ModelConfig, stage: PipelineStage, num_pages: int) -> KVPool:
    kv_format = parse_format(spec.kv_dtype)
    entries = entries_of(config, stage.layers, spec.mesh.tensor, kv_format)
    return KVPool(entries, num_pages, spec.page_size, kv_format, torch.device(spec.device))


def _executor(parts: Parts, spec: RankSpec, max_len: int) -> Executor:
    """The executor of the rank's device. A GPU's state is its own; a CPU has it at hand."""
    if parts.device.type == "cuda":
        return _device_executor(parts, spec, max_len)
    return Executor(parts, spec.max_running, max_len, spec.mesh.num_cohorts)


def _device_executor(parts: Parts, spec: RankSpec, max_len: int) -> DeviceExecutor:
    recorder, deadline = CudaRecorder(parts.device), spec.collective_deadline
    facts = spec.max_running, max_len, spec.mesh.num_cohorts
    return DeviceExecutor(parts, *facts, spec.capacity, recorder, deadline)


def _moe_layers(config: ModelConfig, stage: PipelineStage) -> range:
    """The stage's MoE layers among those of the model."""
    before = sum(layer < stage.layers.start for layer in config.moe_layers)
    return range(before, before + stage.num_moe)


def _grammars(spec: RankSpec, config: ModelConfig) -> Grammars | None:
    vocabulary = load_vocabulary(Path(spec.model_path), config.vocab_size, config.eos_ids)
    return Grammars(vocabulary) if vocabulary is not None else None


def _groups(spec: RankSpec, device: torch.device) -> tuple[Collectives, ...]:
    """The groups of ranks that this one shares experts with, that it splits layers with, that it
    splits dense blocks with, and that have the other stages of its layers: for hidden states, and
    for tokens; and one for moves of experts, which meets if they may move.
    """
    mesh, here = spec.mesh, spec.mesh.coordinates(spec.rank)
    deadline = spec.collective_deadline
    store = MeetingStore(spec, deadline) if mesh.world > 1 else None
    experts = f"experts of stage {here.stage}"
    layers = f"layers of stage {here.stage}, data {here.data}"
    dense = f"dense blocks of stage {here.stage}, group {here.dense_group}"
    stages = f"stages of data {here.data}, tensor {here.tensor}"
    tokens = f"tokens of data {here.data}, tensor {here.tensor}"
    moves = f"moves of experts of stage {here.stage}"
    return (
        Collectives(experts, here.expert, mesh.experts, store, deadline, device),
        Collectives(layers, here.tensor, mesh.tensor, store, deadline, device),
        Collectives(dense, here.dense if mesh.dense else 0, max(1, mesh.dense), store, deadline, device),
        Collectives(stages, here.stage, mesh.pipeline, store, deadline, device, memory=False),
        Collectives(tokens, here.stage, mesh.pipeline, store, deadline, device, memory=False),
        Collectives(moves, here.expert, mesh.experts, store, deadline, device, memory=False),
    )


def _alone(spec: RankSpec, placement: Placement) -> Dispatcher:
    """A dispatcher of the rank's kind, for a group of one."""
    device = torch.device(spec.device)
    collectives = Collectives("warm-up", 0, 1, None, spec.collective_deadline, device)
    config = load_config(Path(spec.model_path))
    return build_dispatcher(spec, config.moe, _dtype(spec.dtype), placement, collectives, Turns())[0]


def _expert_bytes(config: ModelConfig, dtype: torch.dtype, fp8: bool) -> int:
    """Bytes of one expert of one layer with its scales and biases."""
    moe = config.moe
    biases = moe.expert_bias * (2 * moe.expert_width + moe.hidden) * dtype.itemsize
    if config.four_bit is not None:
        return config.four_bit.format.expert_bytes(moe.hidden, moe.expert_width) + biases
    weights = 3 * moe.hidden * moe.expert_width
    if not fp8:
        return weights * dtype.itemsize + biases
    num_scales = 3 * -(-moe.hidden // BLOCK) * -(-moe.expert_width // BLOCK)
    return weights + 4 * num_scales


def _dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise ValueError(f"model.dtype = {name}: allowed are {', '.join(_DTYPES)}")
    return _DTYPES[name]
