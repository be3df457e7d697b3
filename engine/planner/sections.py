"""The sections of a plan: one for each living data index."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..protocol.arrays import Int64
from ..protocol.buckets import BUCKETS
from ..protocol.plan import Section
from .group import Group
from .packing import SectionBytes, i32, pack, pairs
from .prefill import PromptChunks

_BUCKETS = np.array(BUCKETS)


@dataclass(frozen=True)
class RowChanges:
    """Changes of a plan to rows that run: slots to (hold, resume), freed slots, and (slot, page) of
    the rows that grow.
    """

    held: dict[int, tuple[list[int], list[int]]]
    freed: SectionBytes
    grown: SectionBytes


def bucket_of(num_tokens: Int64) -> Int64:
    """The smallest bucket that holds each number of tokens."""
    return _BUCKETS[_BUCKETS.searchsorted(num_tokens)]


class Sections:
    """Collects the parts of each data index's section."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def take_changes(self, grown: SectionBytes) -> RowChanges:
        """Rows held, resumed and freed since the last plan, and the rows that grow."""
        return RowChanges(self._group.rows.take_holds(), self._freed(), grown)

    def build(self, changes: RowChanges, chunks: PromptChunks | None, tokens: Int64) -> dict[int, Section]:
        """Sections that compute ``tokens`` [D]. Data indices that are set back are cleared."""
        group = self._group
        pages, hashes = self._published()
        extends: SectionBytes = {}
        if chunks is not None:
            slots = group.rows.slot(chunks.rows)
            extends = pack(chunks.data, pairs(slots, chunks.counts), group.mesh.data)
        rebasing = np.flatnonzero(group.steps.rebasing).tolist()
        changed = {*pages, *extends, *changes.freed, *changes.held, *rebasing}  # the others only grow
        buckets = bucket_of(tokens).tolist()
        sections: dict[int, Section] = {}
        for data in group.steps.living():
            if data not in changed:
                sections[data] = Section(pages_pairs=changes.grown.get(data, b""), bucket=buckets[data])
                continue
            hold, resume = changes.held.get(data, ((), ()))
            rebase = data in rebasing  # its rank then has no slot left to free
            sections[data] = Section(
                rebase=rebase,
                staged_from=group.preloads.oldest_valid[data] if rebase else 0,
                free_i32=b"" if rebase else changes.freed.get(data, b""),
                hold_i32=i32(hold) if hold else b"",
                resume_i32=i32(resume) if resume else b"",
                admit=() if chunks is None else tuple(chunks.admits.get(data, ())),
                pages_pairs=changes.grown.get(data, b""),
                publish_i32=pages.get(data, b""),
                publish_h128=hashes.get(data, b""),
                extend_pairs=extends.get(data, b""),
                bucket=buckets[data],
            )
        group.steps.rebased()
        return sections

    def _freed(self) -> SectionBytes:
        """Slots of the rows that have been retired since the last plan."""
        group, rows = self._group, self._group.rows
        freeing = group.draining.take_freeing()
        if not freeing:
            return {}
        freed = np.array(freeing)
        rows.clear(freed)
        freed = freed[rows.data(freed).argsort(kind="stable")]
        return pack(rows.data(freed), rows.slot(freed).astype(np.int32), group.mesh.data)

    def _published(self) -> tuple[SectionBytes, SectionBytes]:
        """Pages, and their hashes, of the blocks written since the last plan."""
        group = self._group
        blocks = group.publishing.take()
        if blocks is None:
            return {}, {}
        data, keys, pages = blocks
        local = group.kv.local(pages).astype(np.int32)
        return pack(data, local, group.mesh.data), pack(data, keys, group.mesh.data)
