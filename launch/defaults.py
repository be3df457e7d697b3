"""Defaults of command line options. They live apart so that ``--help`` imports nothing else."""

from __future__ import annotations

CONTEXT = 4096
"""Tokens per request that ``launch plan`` computes batch and floors for."""

BLOCK = 512
"""Tokens per block that the ``hash_ids`` of a trace name, as in the Mooncake traces."""

EFFICIENCY = 0.3
"""Speed of a simulated step as a share of its floor's.

Nine published figures for DeepSeek-V3 reach 0.24 to 0.50 of their floors, 0.31 in the median
(benchmarks/plan_anchors.md).
"""

CANARY_TOKENS = 64
"""Tokens of each answer of the canary."""

CANARY_TOLERANCE = 0.05
"""Log-probabilities of the canary that differ by no more are equal: far above rounding in fp32."""

OPEN_REQUESTS = 512
"""Requests of ``launch load`` that may be open at once: a socket each."""
