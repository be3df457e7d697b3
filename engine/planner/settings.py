"""The parameters of a planner, complete enough to build one."""

from __future__ import annotations

import msgspec

from ...parallel.mesh import Mesh
from ..protocol.specs import SchedulerSpec
from .planner import Planner


class Settings(msgspec.Struct, frozen=True):
    """Constructor arguments of a planner. ``mesh`` is called layout in recordings."""

    mesh: Mesh = msgspec.field(name="layout")
    spec: SchedulerSpec
    num_pages: list[int]
    page_size: int
    max_len: int

    def planner(self) -> Planner:
        return Planner(self.mesh, self.spec, self.num_pages, self.page_size, self.max_len)
