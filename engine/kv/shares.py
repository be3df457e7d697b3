"""How much memory pages take where nobody says: read by ranks, and by plans, which may have no
torch. No torch here.

Shares of free memory that ``kv_cache.memory: auto`` takes: on a CPU of what the ranks of a host
have together, where prompts, activations and other processes need the rest; on a GPU of its own,
after a reserve for activations and libraries.
"""

from __future__ import annotations

CPU_SHARE = 0.5
GPU_SHARE = 0.9
GPU_RESERVE_BYTES = 1 << 30
