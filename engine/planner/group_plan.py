"""One step of a group: its header and a section for each data index."""

from __future__ import annotations

from dataclasses import dataclass

from ..protocol.plan import Header, Section


@dataclass(frozen=True)
class Plan:
    """A step for the whole group: the shared header and the section of every living data index."""

    header: Header
    sections: dict[int, Section]
