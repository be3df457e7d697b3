"""Block sizes of FP8 scales in products: DeepSeek-V3's (arXiv 2412.19437, section 3.3). Imports no
torch.
"""

from __future__ import annotations

BLOCK = 128  # values of a row that share a scale
KERNEL_BLOCK = (BLOCK, BLOCK)  # rows and columns of a weight block in kernels
