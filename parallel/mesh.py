"""The mesh of a group's ranks: world = pipeline x data x tensor, numbered in that order.

Within a pipeline stage the experts are spread over all data x tensor ranks, whatever the attention
does: a second factoring of the same world, pipeline x experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

import msgspec

_Axis = Annotated[int, msgspec.Meta(ge=1)]


@dataclass(frozen=True)
class Coordinates:
    """A rank's stage, data index and tensor index, its index among the ranks that share experts,
    and its place among those that split dense blocks: the number of their group, and the index
    within.
    """

    stage: int
    data: int
    tensor: int
    expert: int
    dense_group: int
    dense: int


class Mesh(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """Sizes of the axes. Recordings hold it, so the fields and their order stay.

    ``dense``: neighbouring ranks of a stage, whole tensor groups, that split dense layers and
    shared experts. 0: each tensor group splits its dense layers, and no shared experts.

    The *members* of a data index are its ranks over all stages and tensor indices: they execute the
    same section of every plan.
    """

    pipeline: _Axis = 1
    data: _Axis = 1
    tensor: _Axis = 1
    dense: Annotated[int, msgspec.Meta(ge=0)] = 0

    def __post_init__(self) -> None:
        assert min(self.pipeline, self.data, self.tensor) >= 1, f"{self}: every axis has at least one rank"
        if self.dense:
            assert self.dense % self.tensor == 0 == self.experts % self.dense, f"{self}: dense groups"

    @property
    def sizes(self) -> str:
        """The axes for a reader."""
        axes = f"pipeline {self.pipeline} x data {self.data} x tensor {self.tensor}"
        return f"{axes}, dense blocks over {self.dense}" if self.dense else axes

    @property
    def world(self) -> int:
        return self.pipeline * self.data * self.tensor

    @property
    def experts(self) -> int:
        """Ranks of a stage, over which its experts are spread."""
        return self.data * self.tensor

    @property
    def shares_dense(self) -> bool:
        """Whether ranks of several data indices split dense blocks: none can do without another."""
        return self.dense > self.tensor

    @property
    def num_cohorts(self) -> int:
        """Cohorts of sequences that take turns, one for each stage to work on."""
        return self.pipeline

    @property
    def depth(self) -> int:
        """Plans in flight that keep every stage busy: one per stage, and one ahead."""
        return self.pipeline + 1

    def rank(self, stage: int, data: int, tensor: int) -> int:
        return (stage * self.data + data) * self.tensor + tensor

    def coordinates(self, rank: int) -> Coordinates:
        assert 0 <= rank < self.world, f"rank {rank} of {self.world}"
        stage, expert = divmod(rank, self.experts)
        data, tensor = divmod(expert, self.tensor)
        return Coordinates(stage, data, tensor, expert, *divmod(expert, self.dense or self.tensor))

    def stage_ranks(self, stage: int) -> range:
        return range(stage * self.experts, (stage + 1) * self.experts)

    def data_of_rank(self, rank: int) -> int:
        return self._data_of_rank[rank]

    def members(self, data: int) -> tuple[int, ...]:
        """Ranks of ``data``, ascending: stage by stage."""
        return self._members[data]

    def positions(self, data: Iterable[int]) -> tuple[int, ...]:
        """Indices, among the ranks that share experts, of the members of data indices."""
        return tuple(index * self.tensor + tensor for index in data for tensor in range(self.tensor))

    def reporter(self, data: int) -> int:
        """The member that reports the tokens of ``data``: the first of the last stage."""
        return self._reporters[data]

    def samples(self, rank: int) -> bool:
        """Whether ``rank`` is the reporter of its data index."""
        return self._samples[rank]

    # Asked for every result of every rank, hence kept.

    @cached_property
    def _data_of_rank(self) -> tuple[int, ...]:
        return tuple(self.coordinates(rank).data for rank in range(self.world))

    @cached_property
    def _reporters(self) -> tuple[int, ...]:
        return tuple(self.rank(self.pipeline - 1, data, 0) for data in range(self.data))

    @cached_property
    def _samples(self) -> tuple[bool, ...]:
        reporters = set(self._reporters)
        return tuple(rank in reporters for rank in range(self.world))

    @cached_property
    def _members(self) -> tuple[tuple[int, ...], ...]:
        return tuple(
            tuple(
                self.rank(stage, data, tensor)
                for stage in range(self.pipeline)
                for tensor in range(self.tensor)
            )
            for data in range(self.data)
        )
