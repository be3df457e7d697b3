"""The rule by which a gate chooses experts. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Routing:
    """How many experts a token goes to, which, and with which weights.

    ``scoring``: softmax over all experts, or an independent sigmoid for each (DeepSeek-V3, arXiv
    2412.19437, section 2.1.2). Of ``num_groups`` equal groups only the ``top_groups`` best are
    eligible, a group being as good as its two best experts together or its best one (DeepSeek-V2,
    arXiv 2405.04434, section 2.2.2): ``group_quality``. ``normalise`` divides the chosen weights by
    their sum; ``scale`` multiplies them.
    """

    top_k: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    normalise: bool = True
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_quality: Literal["best_two", "best"] = "best_two"
