"""Loads weights into a model: all tensors but those of experts without a slot here.

Matrices in FP8 are widened as they are read, except those that the model holds in FP8. Experts in
4 bits are never widened.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.reference.fp8 import Quantised, widen_into
from ...moe.experts import read_slot, write_slot
from ...parallel.linear import WHOLE
from ...parallel.tensor import Shard
from .checkpoint import FP8, POWERS, SCALE_SUFFIX, StoredTensor
from .decoder import ExpertLayer, Model
from .four_bit_tensors import names_of
from .quantisation import StoredFourBit, StoredFp8
from .tensor_source import TensorSource

_LOG = logging.getLogger(__name__)

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

    @property
    def in_fp8(self) -> bool:
        """Whether it is a matrix in FP8, with scales beside it."""
        return self.stored.dtype == FP8 and self.place.convert is None


def load_weights(
    model: Model,
    source: TensorSource,
    experts_of_layer: Callable[[int], list[int]],
    progress: Callable[[float], None],
) -> Loaded:
    """Fills ``model`` from ``source``.

    ``experts_of_layer`` maps a MoE layer (counted among MoE layers) to the logical expert of each
    of its slots, -1 for a slot that stays empty. ``progress`` gets the fraction read, from 0 to 1.
    Raises ValueError naming file and tensor, before reading any, if those of ``source`` do not fit
    the model.
    """
    stored = source.tensors(model)
    model.widen(lambda name: name not in stored or stored[name].dtype == FP8)
    shards = model.checkpoint_shards()
    own_scales = model.checkpoint_scales()
    places = {
        name: _Place(tensor, own_scales.get(name), shards.get(name, WHOLE))
        for name, tensor in model.checkpoint_tensors().items()
    }
    places |= _expert_places(model, experts_of_layer)
    source.check(model, stored)
    reads = [_Read(name, stored[name], place) for name, place in places.items()]
    _report_fp8(reads)
    total = sum(read.stored.num_bytes for read in reads)
    done, shown = 0, 0.0
    progress(0.0)
    for read in _fill(source, stored, reads, model.config.fp8):
        done += read.stored.num_bytes
        if done >= (shown + _PROGRESS_STEP) * total:
            shown = done / total
            progress(shown)
    progress(1.0)
    return Loaded(len(reads), done)


def load_experts(model: Model, source: TensorSource, wanted: Mapping[int, Mapping[int, int]]) -> None:
    """Writes experts into slots of a packed model: ``wanted`` maps a MoE layer (as in
    ``load_weights``) to experts by slot. Raises ValueError if a file cannot be read.
    """
    stored = source.tensors(model)
    for number, slots in wanted.items():
        experts = model.experts()[number]
        spare = experts.spare(len(slots))
        layer = model.expert_layer(number, spare)
        reads = [
            _Read(name, stored[name], place)
            for place_number, expert in enumerate(slots.values())
            for name, place in _projections(layer, place_number, expert, model.config.four_bit)
        ]
        for _ in _fill(source, stored, reads, model.config.fp8):
            pass
        spare.pack()
        for place_number, slot in enumerate(slots):
            write_slot(experts, slot, read_slot(spare, place_number))


def _fill(
    source: TensorSource, stored: Mapping[str, StoredTensor], reads: Iterable[_Read], fp8: StoredFp8 | None
) -> Iterator[_Read]:
    """Reads every tensor into its place, and yields it then."""
    by_name = {read.name: read for read in reads}
    scales = _read_scales(source, stored, by_name, fp8)
    for name, values in source.read({name: read.stored for name, read in by_name.items()}):
        read = by_name[name]
        _store(values, scales.get(name), read.place, fp8)
        yield read


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


def _read_scales(
    source: TensorSource,
    stored: Mapping[str, StoredTensor],
    reads: Mapping[str, _Read],
    fp8: StoredFp8 | None,
) -> dict[str, Tensor]:
    """The scales of matrices in FP8, one per block, by the names of the matrices. They may be in
    other files.
    """
    in_fp8 = [name for name, read in reads.items() if read.in_fp8]
    wanted = {name + SCALE_SUFFIX: stored[name + SCALE_SUFFIX] for name in in_fp8}
    scales = {
        name.removesuffix(SCALE_SUFFIX): values.float() if wanted[name].dtype == POWERS else values
        for name, values in source.read(wanted)
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


def _report_fp8(reads: list[_Read]) -> None:
    """Logs once how many FP8 matrices are widened and kept. Raises ValueError for a matrix that
    should stay in FP8 but is stored in another dtype.
    """
    for read in reads:
        if read.place.scales is not None and read.stored.dtype != FP8:
            found = f"{read.stored.file}: {read.name} has dtype {read.stored.dtype}"
            raise ValueError(f"{found}; experts are held in {FP8} here; set model.dtype to widen all of them")
    in_fp8 = [read for read in reads if read.in_fp8]
    kept = sum(read.place.scales is not None for read in in_fp8)
    if in_fp8:
        _LOG.info("%d matrices in FP8 are widened as they are read, %d stay in FP8", len(in_fp8) - kept, kept)
