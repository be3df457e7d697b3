"""The parts of a Mixture-of-Experts layer whose seconds ranks report. No torch here."""

from __future__ import annotations

PHASES = ("dispatch", "expert", "combine")
DISPATCH, EXPERT, COMBINE = range(len(PHASES))
