"""One step of a group: its header and a section for each data index."""

from __future__ import annotations

from dataclasses import dataclass

from ..protocol.plan import Header, Section


@dataclass(frozen=True)
class GroupPlan:
    """A step of the whole group: the shared header, and a section for every living data index."""

    header: Header
    sections: dict[int, Section]
