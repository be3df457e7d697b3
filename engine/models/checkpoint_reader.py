"""Reads the tensors of a checkpoint directory.

The headers of the whole checkpoint are checked first, also for tensors that are not read.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .checkpoint import SCALE_SUFFIX, StoredTensor, check_tensors, read_checkpoint
from .config import ModelConfig
from .decoder import Model
from .expected_tensors import expected_shapes, expert_shapes
from .four_bit_tensors import check_four_bit, check_others, names_of, unused_names
from .stored_names import UNUSED_SCALES, scales_by_our_name, separate_experts, text_model

_LOG = logging.getLogger(__name__)

_LAYER = re.compile(r"model\.layers\.(\d+)\.")


class CheckpointReader:
    """The tensors in directory ``path``, as a ``TensorSource``."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def tensors(self, model: Model) -> dict[str, StoredTensor]:
        """Raises ValueError naming the file at fault (``read_checkpoint``)."""
        config = model.config
        found = separate_experts(text_model(self._path, read_checkpoint(self._path)), config.names)
        return scales_by_our_name(found) if config.fp8 is not None else found

    def check(self, model: Model, found: Mapping[str, StoredTensor]) -> None:
        """Logs once which tensors the model does not use. Raises ValueError naming file and tensor
        if the checkpoint does not fit the model.
        """
        path, config, expected = self._path, model.config, expected_shapes(model)
        check_others(path, found, expected)
        check_tensors(path, found, expected, config.fp8)
        if config.four_bit is not None:
            check_four_bit(path, found, expert_shapes(model), config.four_bit)
        _report_unexpected(path, found, expected, model)

    def read(self, wanted: Mapping[str, StoredTensor]) -> Iterator[tuple[str, Tensor]]:
        """Reads in the order of the files. Raises ValueError for one that cannot be read."""
        ordered = sorted(wanted.items(), key=lambda item: (str(item[1].file), item[1].begin))
        for file, group in groupby(ordered, key=lambda item: item[1].file):
            try:
                with safe_open(file, framework="pt") as reader:
                    for name, stored in group:
                        yield name, values_of(reader, stored)
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{file}: not readable as safetensors: {error}") from None


def values_of(reader: Any, stored: StoredTensor) -> Tensor:
    """The values of a tensor in the open file ``reader``."""
    cut = stored.cut
    if cut is None:
        return cast(Tensor, reader.get_tensor(stored.name))
    whole = reader.get_slice(stored.name)
    matrix = slice(cut.index, cut.index + 1)
    rows = slice(cut.first, cut.last)
    if cut.transposed:
        return cast(Tensor, whole[matrix, :, rows])[0].T[:: cut.step]
    return cast(Tensor, whole[matrix, rows])[0][:: cut.step].reshape(stored.shape)


def _report_unexpected(
    path: Path, stored: Mapping[str, StoredTensor], expected: dict[str, tuple[int, ...]], model: Model
) -> None:
    """Logs once which tensors of the checkpoint the model does not use, apart from known ones."""
    config = model.config
    known = expected.keys() | ({name + SCALE_SUFFIX for name in expected} if config.fp8 else set())
    if config.four_bit is not None:
        for matrix in expert_shapes(model):
            found = names_of(matrix, config.four_bit)
            known |= {found.codes, found.scales, found.factor, *unused_names(matrix)}
    names = [
        name
        for name in stored
        if name not in known and not _known(name, config) and not _elsewhere(name, model)
    ]
    if names:
        _LOG.warning("%s: %d tensors are not used, the first is %s", path, len(names), names[0])
    if further := sum(_predicts_further(name, config) for name in stored):
        _LOG.info(
            "%s: %d tensors of layers from %d on, which predict further tokens, are not loaded",
            path,
            further,
            config.num_layers,
        )


def _known(name: str, config: ModelConfig) -> bool:
    """Whether a tensor is known to be unused: layers that predict further tokens, rotary
    frequencies, scales of activations, the copy of tied embeddings.
    """
    tied = config.tie_embeddings and name == "lm_head.weight"
    unused = name.endswith(("rotary_emb.inv_freq", *(UNUSED_SCALES if config.fp8 else ())))
    return _predicts_further(name, config) or unused or tied


def _elsewhere(name: str, model: Model) -> bool:
    """Whether another stage has the tensor, which checks it there."""
    layer = _LAYER.match(name)
    if layer is None:
        return not (model.stage.first and model.stage.last)
    return int(layer[1]) < model.config.num_layers and int(layer[1]) not in model.stage.layers


def _predicts_further(name: str, config: ModelConfig) -> bool:
    layer = _LAYER.match(name)
    return (
        layer is not None
        and config.num_layers <= int(layer[1]) < config.num_layers + config.num_predict_layers
    )
