"""The parameters of a planner, complete enough to build one."""

from __future__ import annotations

import msgspec

from ..protocol.specs import Layout, SchedulerSpec
from .planner import Planner


class Settings(msgspec.Struct, frozen=True):
    """What a planner is constructed with."""

    layout: Layout
    spec: SchedulerSpec
    num_pages: list[int]
    page_size: int
    max_len: int

    def planner(self) -> Planner:
        return Planner(self.layout, self.spec, self.num_pages, self.page_size, self.max_len)
