"""The function between the two products of an expert. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Activation:
    """``silu``: silu(gate) * up. ``clamped``: with g = min(gate, limit) and u = up within +-limit,
    g * sigmoid(alpha * g) * (u + 1), as in gpt-oss.
    """

    kind: Literal["silu", "clamped"] = "silu"
    alpha: float = 1.0
    limit: float = math.inf


SILU = Activation()
