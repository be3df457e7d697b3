"""The factorings of a group's world.

A world is pipeline x data x tensor, rank-major in that order. Within a pipeline stage the experts
are spread over all data x tensor ranks, whatever the attention does: a second factoring of the same
world, pipeline x experts.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Coordinates:
    """Where a rank stands: its stage, data index and tensor index, and its index among the ranks
    that share experts.
    """

    stage: int
    data: int
    tensor: int
    expert: int


@dataclass(frozen=True)
class Mesh:
    """Sizes of the axes, each at least 1."""

    pipeline: int
    data: int
    tensor: int

    def __post_init__(self) -> None:
        assert min(self.pipeline, self.data, self.tensor) >= 1, f"{self}: every axis has at least one rank"
        assert self.pipeline * self.data * self.tensor == self.pipeline * self.experts == self.world

    @property
    def world(self) -> int:
        return self.pipeline * self.data * self.tensor

    @property
    def experts(self) -> int:
        """Ranks over which the experts of a stage are spread."""
        return self.data * self.tensor

    def coordinates(self, rank: int) -> Coordinates:
        assert 0 <= rank < self.world, f"rank {rank} of {self.world}"
        stage, expert = divmod(rank, self.experts)
        data, tensor = divmod(expert, self.tensor)
        assert rank == (stage * self.data + data) * self.tensor + tensor
        return Coordinates(stage, data, tensor, expert)
