"""The executor of a device for real models, on tensors without memory, with Triton's kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from numpy.typing import NDArray
from torch import Tensor

from lockstep.engine.models.config import ModelConfig, load_config
from lockstep.engine.models.registry import ModelPart, build_model
from lockstep.engine.rank.device import executor as device_executor
from lockstep.engine.rank.device.executor import DeviceExecutor
from lockstep.engine.rank.device.graphs import GraphRecorder
from lockstep.engine.rank.device.transfers import SideStream
from lockstep.engine.rank.page_pool import KVPool, entries_of
from lockstep.engine.rank.parts import Parts
from lockstep.launch.recipe.file import find_recipe
from lockstep.moe.balance.placement import contiguous
from lockstep.moe.balance.start import starting_placement
from lockstep.moe.clock import NoClock
from lockstep.moe.dispatch.all_gather import AllGatherExchange
from lockstep.moe.dispatch.dispatcher import Dispatcher
from lockstep.moe.dispatch.exchange import Exchange, ExchangeDispatcher
from lockstep.moe.dispatch.local import LocalDispatcher
from lockstep.moe.dispatch.nvlink import NvlinkExchange
from lockstep.moe.dispatch.slot_major import SlotMajorExchange
from lockstep.moe.dispatch.symmetric import SymmetricExchange
from lockstep.moe.dispatch.within_capacity import TokenShape
from lockstep.parallel.collectives import Collectives
from lockstep.parallel.deepep import DeepEPGroup
from lockstep.parallel.dense import UNSPLIT_LAYERS, split_as_attention
from lockstep.parallel.microbatches import Turns
from lockstep.parallel.nccl_ep import NcclEpGroup
from lockstep.parallel.nvlink import NvlinkGroup
from lockstep.parallel.pipeline import PipelineLinks
from lockstep.parallel.rank_groups import RankGroups
from lockstep.parallel.slot_major import SlotGroup
from lockstep.parallel.stages import whole_model
from lockstep.parallel.symmetric_memory import SymmetricGroup, TorchSymmetricLibrary
from lockstep.parallel.tensor import TensorGroup

from ...parallel.deepep_double import DeepEPDouble
from ...parallel.nccl_ep_double import NcclEpDouble
from ...parallel.nvlink_double import NvlinkDouble

META = torch.device("meta")
CONFIGS = find_recipe("demo").parent / "configs"
ROWS = 256
MAX_LEN, MAX_TOKENS = 4096, 8192
NUM_RANKS, REDUNDANT = 72, 32


class NoUpload:
    """Arrays that arrive as tensors without memory."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        """Keeps nothing."""

    def send(self, arrays: Sequence[NDArray[Any]]) -> list[Tensor]:
        return [torch.from_numpy(array).to(META) for array in arrays]


def executor_of(
    name: str,
    num_layers: int | None = None,
    dispatch: str = "local",
    capacities: tuple[int, ...] = (ROWS,),
    tensor: int = 1,
    max_len: int = MAX_LEN,
    recorder: GraphRecorder | None = None,
    side: SideStream | None = None,
) -> DeviceExecutor:
    """The executor of the model ``name``, of its first ``num_layers`` layers if given. ``dispatch``
    over the ranks of an NVL72 rack unless local, as in its recipe, of steps of ``capacities`` as in
    ``TokenShape``. ``tensor``: ranks that split its layers. With a ``side`` stream uploads are real
    ones.
    """
    config = load_config(CONFIGS / name)
    if num_layers is not None:
        moe_layers = tuple(layer for layer in config.moe_layers if layer < num_layers)
        windows = config.windows[:num_layers]
        config = replace(config, num_layers=num_layers, moe_layers=moe_layers, windows=windows)
    alone = Collectives("alone", 0, 1, None, 1.0, META)
    turns = Turns()
    dispatcher = _dispatcher_of(config, dispatch, capacities, turns)
    stage, splits = whole_model(config.num_layers, config.moe_layers), UNSPLIT_LAYERS
    if tensor > 1:
        layers = Collectives("layers", 0, tensor, torch.distributed.HashStore(), 1.0, META)
        layers.rehearse()
        splits = split_as_attention(TensorGroup(layers, turns.give))
    part = ModelPart(stage, splits)
    model = build_model(
        config, dispatcher, torch.bfloat16, META, "triton", keep_fp8=config.kernel_fp8, part=part
    )
    parts = Parts(
        rank=0,
        model=model,
        dispatcher=dispatcher,
        groups=RankGroups(alone),
        splits=splits,
        links=PipelineLinks(alone, alone, stage, META),
        turns=turns,
        samples=True,
        pool=KVPool(entries_of(config, stage.layers, tensor, "fp8"), 1000, 64, "fp8", META),
        device=META,
    )
    doubles: dict[str, Any] = {"Upload": NoUpload}
    if side is not None:
        doubles = {"side_stream": lambda device: side}
    with mock.patch.multiple(device_executor, **doubles):
        return DeviceExecutor(parts, ROWS, max_len, 1, MAX_TOKENS, recorder)


def _dispatcher_of(
    config: ModelConfig, dispatch: str, capacities: tuple[int, ...], turns: Turns
) -> Dispatcher:
    moe, num_layers = config.moe, len(config.moe_layers)
    if dispatch == "local":
        return LocalDispatcher(contiguous(num_layers, moe.num_experts, 1), META, NoClock())
    placement = starting_placement(num_layers, moe.num_experts, NUM_RANKS, REDUNDANT)
    exchange: Exchange
    place = "experts", 0, NUM_RANKS, torch.distributed.HashStore()
    if dispatch == "all_gather":
        group = Collectives(*place, 1.0, META)
        group.rehearse()
        exchange = AllGatherExchange(placement, group, META, eight=config.kernel_fp8)
    elif dispatch == "flashinfer":
        linked = NvlinkGroup(*place, META, NvlinkDouble(Collectives("alone", 0, 1, None, 1.0, META)))
        shape = TokenShape(capacities, moe.top_k, moe.hidden, torch.bfloat16, config.kernel_fp8)
        exchange = NvlinkExchange(placement, linked, META, shape)
        linked.rehearse()
    elif dispatch in ("deepep", "nccl_ep"):
        alone = Collectives("alone", 0, 1, None, 1.0, META)
        group_by: SlotGroup = (
            DeepEPGroup(*place, META, DeepEPDouble(alone))
            if dispatch == "deepep"
            else NcclEpGroup(*place, META, NcclEpDouble(alone))
        )
        shape = TokenShape(capacities, moe.top_k, moe.hidden, torch.bfloat16, config.kernel_fp8)
        exchange = SlotMajorExchange(placement, group_by, META, shape)
        group_by.rehearse()
    else:
        memory = SymmetricGroup(*place, META, TorchSymmetricLibrary())
        shape = TokenShape(capacities, moe.top_k, moe.hidden, torch.bfloat16, config.kernel_fp8)
        exchange = SymmetricExchange(placement, memory, META, shape)
        memory.rehearse()
    return ExchangeDispatcher(exchange, META, NoClock(), turns.give)
