"""The progress of a rank until it serves, as the launcher shows it."""

from __future__ import annotations

from ..protocol.lobby import Lobby


class RankProgress:
    """Reports how far a rank is."""

    def __init__(self, lobby: Lobby) -> None:
        self._lobby = lobby
        self._detail: str | None = None  # once ready
        self._busy = False

    def loaded(self, fraction: float) -> None:
        """Reports the fraction of the weights that is loaded."""
        self._lobby.report("loading", fraction=fraction)

    def tell(self, text: str) -> None:
        """As ``Parts.tell``. A rank that has captured steps in a new epoch is ready again."""
        if text:
            self._lobby.report("compiling", text)
        elif self._busy and self._detail is not None:
            self._lobby.report("ready", self._detail)
        self._busy = bool(text)

    def ready(self, detail: str) -> None:
        """Reports that the rank executes plans."""
        self._detail, self._busy = detail, False
        self._lobby.report("ready", detail)
