"""The phases of a Mixture-of-Experts layer: ranks report the seconds of each. No torch here."""

from __future__ import annotations

PHASES = ("dispatch", "expert", "combine")
DISPATCH, EXPERT, COMBINE = range(len(PHASES))
