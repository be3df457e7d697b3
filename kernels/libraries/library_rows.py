"""Attention of some rows of a batch by a library, or by our own kernel where it has none."""

from __future__ import annotations

from ..reference.attention import PLAIN_RULE, AttentionRule
from ..reference.paged import PagedBatch
from ..triton.attend_inputs import AttendRows, Keys, Queries
from ..triton.tiles import AttendTile
from .said_once import SaidOnce


class LibraryRows:
    """An ``AttendRows``, of which a library fills ``_reason`` and ``_attend``. ``setting``: that of
    the recipe which names it. ``own``: the attention for what it does not have; the log says so
    once for each reason.
    """

    def __init__(self, setting: str, own: AttendRows) -> None:
        self._say, self._own = SaidOnce(setting), own

    def __call__(
        self,
        queries: Queries,
        keys: Keys,
        batch: PagedBatch,
        scale: float,
        tile: AttendTile,
        rule: AttentionRule = PLAIN_RULE,
    ) -> None:
        reason = self._reason(queries, keys, batch)
        if reason:
            self._say(reason)
            self._own(queries, keys, batch, scale, tile, rule)
        else:
            self._attend(queries, keys, batch, scale, rule)

    def _reason(self, queries: Queries, keys: Keys, batch: PagedBatch) -> str:
        """The reason why the library does not attend these rows; empty: it does."""
        raise NotImplementedError

    def _attend(
        self, queries: Queries, keys: Keys, batch: PagedBatch, scale: float, rule: AttentionRule
    ) -> None:
        raise NotImplementedError
