"""The settings of one group's planner."""

from __future__ import annotations

import msgspec

from ...parallel.mesh import Mesh
from ..protocol.specs import SchedulerSpec


class Settings(msgspec.Struct, frozen=True, omit_defaults=True):
    """Everything that a planner is built from; a recording begins with it, where ``mesh`` is called
    layout. ``num_pages`` [data] are pool sizes, ``group`` is the group's index in its cluster.
    ``epoch`` is the first one: ranks refuse those of an earlier controller. ``placement_version``
    is the id of the last moves of experts before. ``tell_changes``: changes of the block index are
    kept for ``Planner.take_changes``.
    """

    mesh: Mesh = msgspec.field(name="layout")
    spec: SchedulerSpec
    num_pages: list[int]
    page_size: int
    max_len: int
    group: int = 0
    epoch: int = 0
    placement_version: int = 0
    tell_changes: bool = False
