"""How FP8 values share their scales in products: DeepSeek-V3's blocks (arXiv 2412.19437, section
3.3). No torch here.
"""

from __future__ import annotations

BLOCK = 128  # values of a row with one scale
KERNEL_BLOCK = (BLOCK, BLOCK)  # rows and columns of a block of weights that kernels take
