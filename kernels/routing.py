"""The rule by which a gate chooses experts. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Routing:
    """The routing rule: the number of experts per token, their choice and their weights.

    ``scoring``: softmax over all experts, or an independent sigmoid for each (DeepSeek-V3, arXiv
    2412.19437, section 2.1.2). Only experts in the ``top_groups`` best of ``num_groups`` equal
    groups are eligible. ``group_quality`` scores a group by its two best experts together or by its
    best one (DeepSeek-V2, arXiv 2405.04434, section 2.2.2). ``normalise`` divides the chosen
    weights by their sum; ``scale`` multiplies them. With ``logit_bias`` a gate's bias is added to
    its logits, so that weights have it too; otherwise to the scores, for the choice alone.
    """

    top_k: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    normalise: bool = True
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_quality: Literal["best_two", "best"] = "best_two"
    logit_bias: bool = False
