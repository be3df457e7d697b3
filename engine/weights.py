"""Loads a checkpoint into a model: everything but routed experts, and those experts that have a slot here.

The whole checkpoint is checked from its headers first, also the part that is not read.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .checkpoint import StoredTensor, check_tensors, read_checkpoint
from .models.config import ModelConfig
from .models.decoder import Model

_LOG = logging.getLogger(__name__)

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_PROGRESS_STEP = 0.01


@dataclass(frozen=True)
class Loaded:
    """What was read: tensors and their bytes in the checkpoint's dtype, headers not counted."""

    num_tensors: int
    num_bytes: int


@dataclass(frozen=True)
class _Read:
    """One tensor to read, and where it goes; values are cast on the way."""

    name: str
    stored: StoredTensor
    target: Tensor


def load_weights(model: Model, path: Path, experts_of_layer: Callable[[int], list[int]], progress: Callable[[float], None]) -> Loaded:
    """Fills ``model`` from the checkpoint in directory ``path``.

    ``experts_of_layer`` maps a MoE layer (counted among MoE layers) to the logical expert of each of its slots, -1 for a
    slot that stays empty. ``progress`` is told the fraction read, from 0 to 1. Raises ValueError naming file and tensor
    before anything is read where the checkpoint does not fit the model (``read_checkpoint``, ``check_tensors``).
    """
    stored = read_checkpoint(path)
    targets = [*model.checkpoint_tensors().items(), *_expert_targets(model, experts_of_layer)]
    expected = expected_shapes(model)
    check_tensors(path, stored, expected)
    _report_unexpected(path, stored, expected, model.config)
    reads = [_Read(name, stored[name], target) for name, target in targets]
    total = sum(read.stored.num_bytes for read in reads)
    done, shown = 0, 0.0
    progress(0.0)
    for num_bytes in _execute(reads):
        done += num_bytes
        if done >= (shown + _PROGRESS_STEP) * total:
            shown = done / total
            progress(shown)
    progress(1.0)
    return Loaded(len(reads), done)


def expected_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Every tensor a checkpoint of this model must hold, those of experts without a slot here included."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.checkpoint_tensors().items()}
    moe = model.config.moe
    for layer in model.expert_layers():
        for expert in range(moe.num_experts):
            for projection in _PROJECTIONS:
                up = (moe.expert_width, moe.hidden)
                shapes[f"{layer.name}.{expert}.{projection}.weight"] = up if projection != "down_proj" else up[::-1]
    return shapes


def _expert_targets(model: Model, experts_of_layer: Callable[[int], list[int]]) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint name and the place of every projection of every expert that has a slot here."""
    width = model.config.moe.expert_width
    for number, layer in enumerate(model.expert_layers()):
        for slot, expert in enumerate(experts_of_layer(number)):
            if expert >= 0:
                w13_FD = layer.w13_SFD[slot]
                for projection, target in zip(_PROJECTIONS, (w13_FD[:width], w13_FD[width:], layer.w2_SDF[slot]), strict=True):
                    yield f"{layer.name}.{expert}.{projection}.weight", target


def _execute(reads: list[_Read]) -> Iterator[int]:
    """Reads in the order of the files; yields the bytes of each tensor read."""
    ordered = sorted(reads, key=lambda read: (str(read.stored.file), read.stored.begin))
    for file, group in groupby(ordered, key=lambda read: read.stored.file):
        try:
            with safe_open(file, framework="pt") as reader:
                for read in group:
                    read.target.copy_(reader.get_tensor(read.name))
                    yield read.stored.num_bytes
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file}: not readable as safetensors: {error}") from None


def _report_unexpected(path: Path, stored: dict[str, StoredTensor], expected: dict[str, tuple[int, ...]], config: ModelConfig) -> None:
    """Logs once what the checkpoint holds beyond the model, but for what is known to be there and unused."""
    names = [name for name in stored if name not in expected and not _known(name, config)]
    if names:
        _LOG.warning("%s: %d tensors are not used, the first is %s", path, len(names), names[0])


def _known(name: str, config: ModelConfig) -> bool:
    """Rotary frequencies, layers past the last (multi-token prediction), and the copy of tied embeddings."""
    layer = _LAYER.match(name)
    beyond = layer is not None and int(layer[1]) >= config.num_layers
    return beyond or name.endswith("rotary_emb.inv_freq") or (config.tie_embeddings and name == "lm_head.weight")
