"""Loads a checkpoint into a model: all tensors but those of experts without a slot here.

The headers of the whole checkpoint are checked first, also for tensors that are not read. Matrices
in FP8 are widened as they are read, except those that the model holds in FP8. Experts in 4 bits are
never widened.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...kernels.reference.fp8 import Quantised, widen_into
from ...moe.experts import read_slot, write_slot
from ...parallel.linear import WHOLE
from ...parallel.tensor import Shard
from .checkpoint import FP8, POWERS, SCALE_SUFFIX, StoredTensor, check_tensors, read_checkpoint
from .config import ModelConfig
from .decoder import ExpertLayer, Model
from .four_bit_tensors import check_four_bit, check_others, names_of, unused_names
from .quantisation import StoredFourBit, StoredFp8
from .stored_names import UNUSED_SCALES, scales_by_our_name, separate_experts, text_model

_LOG = logging.getLogger(__name__)

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_PROGRESS_STEP = 0.01


@dataclass(frozen=True)
class Loaded:
    """The number of tensors read, and their bytes in the checkpoint's dtype without headers and
    scales.
    """

    num_tensors: int
    num_bytes: int


@dataclass(frozen=True)
class _Place:
    """The target of a tensor, or of a part of it, and of its scales if it stays in FP8; otherwise
    values are cast or widened. ``convert`` makes the values of those read, instead.
    """

    values: Tensor
    scales: Tensor | None = None
    shard: Shard = WHOLE
    convert: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class _Read:
    """One tensor to read, and its target."""

    name: str
    stored: StoredTensor
    place: _Place


def load_weights(
    model: Model, path: Path, experts_of_layer: Callable[[int], list[int]], progress: Callable[[float], None]
) -> Loaded:
    """Fills ``model`` from the checkpoint in directory ``path``.

    ``experts_of_layer`` maps a MoE layer (counted among MoE layers) to the logical expert of each
    of its slots, -1 for a slot that stays empty. ``progress`` gets the fraction read, from 0 to 1.
    Raises ValueError naming file and tensor, before reading any, if the checkpoint does not fit the
    model (``read_checkpoint``, ``check_tensors``).
    """
    fp8 = model.config.fp8
    stored = _stored(path, model.config)
    model.widen(lambda name: name not in stored or stored[name].dtype == FP8)
    shards, own_scales = model.checkpoint_shards(), model.checkpoint_scales()
    places = {
        name: _Place(tensor, own_scales.get(name), shards.get(name, WHOLE))
        for name, tensor in model.checkpoint_tensors().items()
    }
    places |= _expert_places(model, experts_of_layer)
    expected, four_bit = expected_shapes(model), model.config.four_bit
    check_others(path, stored, expected)
    check_tensors(path, stored, expected, fp8)
    if four_bit is not None:
        check_four_bit(path, stored, expert_shapes(model), four_bit)
    _report_unexpected(path, stored, expected, model)
    reads = [_Read(name, stored[name], place) for name, place in places.items()]
    _report_fp8(path, reads)
    total = sum(read.stored.num_bytes for read in reads)
    done, shown = 0, 0.0
    progress(0.0)
    scales = _read_scales(stored, reads, fp8)
    for read, values in _in_file_order(reads):
        _store(values, scales.get(read.name), read.place, fp8)
        done += read.stored.num_bytes
        if done >= (shown + _PROGRESS_STEP) * total:
            shown = done / total
            progress(shown)
    progress(1.0)
    return Loaded(len(reads), done)


def load_experts(model: Model, path: Path, wanted: Mapping[int, Mapping[int, int]]) -> None:
    """Writes experts into slots of a packed model: ``wanted`` maps a MoE layer (as in
    ``load_weights``) to experts by slot. Raises ValueError if a file cannot be read.
    """
    fp8 = model.config.fp8
    stored = _stored(path, model.config)
    for number, slots in wanted.items():
        experts = model.experts()[number]
        spare = experts.spare(len(slots))
        layer = model.expert_layer(number, spare)
        reads = [
            _Read(name, stored[name], place)
            for place_number, expert in enumerate(slots.values())
            for name, place in _projections(layer, place_number, expert, model.config.four_bit)
        ]
        scales = _read_scales(stored, reads, fp8)
        for read, values in _in_file_order(reads):
            _store(values, scales.get(read.name), read.place, fp8)
        spare.pack()
        for place_number, slot in enumerate(slots):
            write_slot(experts, slot, read_slot(spare, place_number))


def _stored(path: Path, config: ModelConfig) -> dict[str, StoredTensor]:
    """The tensors of the text model by the names that ``config`` makes, an expert's matrix each."""
    found = separate_experts(text_model(path, read_checkpoint(path)), config.names)
    return scales_by_our_name(found) if config.fp8 is not None else found


def expected_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors that a checkpoint of this model must hold, including those of
    experts without a slot here, but for experts in 4 bits. Split tensors count as wholes.
    """
    shards = model.checkpoint_shards()
    shapes = {
        name: shards.get(name, WHOLE).whole(tuple(tensor.shape))
        for name, tensor in model.checkpoint_tensors().items()
    }
    matrices = expert_shapes(model)
    if model.config.four_bit is None:
        shapes |= {f"{name}.weight": shape for name, shape in matrices.items()}
    if model.config.moe.expert_bias:
        shapes |= {f"{name}.bias": (rows,) for name, (rows, _) in matrices.items()}
    return shapes


def expert_shapes(model: Model) -> dict[str, tuple[int, int]]:
    """Rows and columns of every matrix of routed experts, by its name without the last part."""
    moe, shapes = model.config.moe, dict[str, tuple[int, int]]()
    up, down = (moe.expert_width, moe.hidden), (moe.hidden, moe.expert_width)
    for layer in model.expert_layers():
        for expert in range(moe.num_experts):
            for projection, shape in zip(layer.projections, (up, up, down), strict=True):
                shapes[f"{layer.name}.{expert}.{projection}"] = shape
    return shapes


def _expert_places(
    model: Model, experts_of_layer: Callable[[int], list[int]]
) -> Iterator[tuple[str, _Place]]:
    """The checkpoint name and the place of every tensor of the experts with a slot here."""
    for number, layer in enumerate(model.expert_layers()):
        for slot, expert in enumerate(experts_of_layer(number)):
            if expert >= 0:
                yield from _projections(layer, slot, expert, model.config.four_bit)


def _projections(
    layer: ExpertLayer, slot: int, expert: int, four_bit: StoredFourBit | None
) -> Iterator[tuple[str, _Place]]:
    """The checkpoint name and the place of every tensor of an expert in ``slot``."""
    matrices = [f"{layer.name}.{expert}.{projection}" for projection in layer.projections]
    if layer.biases is not None:
        up_F, down_D = (biases[slot] for biases in layer.biases)
        for matrix, target in zip(matrices, (*up_F.chunk(2), down_D), strict=True):
            yield f"{matrix}.bias", _Place(target)
    if four_bit is not None:
        for number, matrix in enumerate(matrices):
            yield from _four_bit_places(layer, slot, number, matrix, four_bit)
        return
    for matrix, place in zip(matrices, _slot_places(layer, slot), strict=True):
        yield f"{matrix}.weight", place


def _four_bit_places(
    layer: ExpertLayer, slot: int, number: int, matrix: str, stored: StoredFourBit
) -> Iterator[tuple[str, _Place]]:
    """The name and the place of every tensor of a matrix in 4 bits: gate, up or down by
    ``number``.
    """
    assert layer.four_bit is not None
    names, w = names_of(matrix, stored), layer.four_bit[number // 2]
    part, parts = (0, 1) if number == 2 else (number, 2)
    for name, tensor in ((names.codes, w.codes), (names.scales, w.scales)):
        target = tensor.data[slot].chunk(parts)[part].view(torch.uint8)
        yield name, _Place(target, convert=_as_bytes)
    if w.factors is not None:
        convert = _inverse if names.factor_divides else _scalar
        yield names.factor, _Place(w.factors.data[slot, part], convert=convert)


def _as_bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)


def _scalar(values: Tensor) -> Tensor:
    return values.reshape(())


def _inverse(values: Tensor) -> Tensor:
    return 1.0 / values.reshape(())


def _slot_places(layer: ExpertLayer, slot: int) -> tuple[_Place, _Place, _Place]:
    """The places of an expert's gate, up and down matrices."""
    gate_FD, up_FD = layer.w13_SFD[slot].chunk(2)
    if layer.scales is None:
        return _Place(gate_FD), _Place(up_FD), _Place(layer.w2_SDF[slot])
    w13_scales, w2_scales = layer.scales[0][slot], layer.scales[1][slot]
    return _Place(gate_FD, w13_scales[0]), _Place(up_FD, w13_scales[1]), _Place(layer.w2_SDF[slot], w2_scales)


def _in_file_order(reads: Iterable[_Read]) -> Iterator[tuple[_Read, Tensor]]:
    """Reads every tensor, in the order of the files."""
    ordered = sorted(reads, key=lambda read: (str(read.stored.file), read.stored.begin))
    for file, group in groupby(ordered, key=lambda read: read.stored.file):
        try:
            with safe_open(file, framework="pt") as reader:
                for read in group:
                    yield read, values_of(reader, read.stored)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file}: not readable as safetensors: {error}") from None


def values_of(reader: Any, stored: StoredTensor) -> Tensor:
    """The values of a tensor in the open file ``reader``."""
    cut = stored.cut
    if cut is None:
        return cast(Tensor, reader.get_tensor(stored.name))
    whole, matrix, rows = (
        reader.get_slice(stored.name),
        slice(cut.index, cut.index + 1),
        slice(cut.first, cut.last),
    )
    if cut.transposed:
        return cast(Tensor, whole[matrix, :, rows])[0].T[:: cut.step]
    return cast(Tensor, whole[matrix, rows])[0][:: cut.step].reshape(stored.shape)


def _read_scales(
    stored: dict[str, StoredTensor], reads: list[_Read], fp8: StoredFp8 | None
) -> dict[str, Tensor]:
    """The scales of matrices in FP8, one per block, by the names of the matrices. They may be in
    other files.
    """
    in_fp8 = [read for read in reads if read.stored.dtype == FP8 and read.place.convert is None]
    names = {read.name + SCALE_SUFFIX: read for read in in_fp8}
    found = _in_file_order(_Read(name, stored[name], read.place) for name, read in names.items())
    scales = {
        read.name.removesuffix(SCALE_SUFFIX): values.float() if read.stored.dtype == POWERS else values
        for read, values in found
    }
    if fp8 is not None and fp8.whole:
        blocks = {name: fp8.blocks_of(stored[name].shape) for name in scales}
        return {name: one.reshape(1, 1).expand(blocks[name]) for name, one in scales.items()}
    return scales


def _store(values: Tensor, scales: Tensor | None, place: _Place, fp8: StoredFp8 | None) -> None:
    if place.convert is not None:
        place.values.copy_(place.convert(values))
    elif not place.shard.is_whole:
        _store_part(values, scales, place, fp8)
    elif scales is None:
        place.values.copy_(values)
    elif place.scales is None:
        assert fp8 is not None
        widen_into(place.values, Quantised(values, scales), fp8.block)
    else:
        place.values.copy_(values)
        place.scales.copy_(scales)


def _store_part(values: Tensor, scales: Tensor | None, place: _Place, fp8: StoredFp8 | None) -> None:
    """Stores a part of a tensor. FP8 that does not stay so is widened as a whole first: a part may
    begin inside a block.
    """
    shard, target = place.shard, place.values
    if scales is not None and place.scales is not None:
        assert fp8 is not None
        start, end = shard.bounds(target.shape[shard.dim])
        size = fp8.block[shard.dim]
        cut = scales.narrow(shard.dim, start // size, -(-end // size) - start // size)
        place.scales.copy_(cut)
    elif scales is not None:
        assert fp8 is not None
        whole = target.new_empty(values.shape)
        widen_into(whole, Quantised(values, scales), fp8.block)
        values = whole
    if shard.added_once:
        target.copy_(values) if shard.index == 0 else target.zero_()
        return
    start, end = shard.bounds(target.shape[shard.dim])
    target.narrow(shard.dim, 0, end - start).copy_(values.narrow(shard.dim, start, end - start))


def _report_fp8(path: Path, reads: list[_Read]) -> None:
    """Logs once how many FP8 matrices are widened and kept. Raises ValueError for a matrix that
    should stay in FP8 but is stored in another dtype.
    """
    for read in reads:
        if read.place.scales is not None and read.stored.dtype != FP8:
            found = f"{read.stored.file}: {read.name} has dtype {read.stored.dtype}"
            raise ValueError(f"{found}; experts are held in {FP8} here; set model.dtype to widen all of them")
    in_fp8 = [read for read in reads if read.stored.dtype == FP8 and read.place.convert is None]
    kept = [read for read in in_fp8 if read.place.scales is not None]
    if in_fp8:
        _LOG.info(
            "%s: %d matrices in FP8 are widened as they are read, %d stay in FP8",
            path,
            len(in_fp8) - len(kept),
            len(kept),
        )


def _report_unexpected(
    path: Path, stored: dict[str, StoredTensor], expected: dict[str, tuple[int, ...]], model: Model
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
