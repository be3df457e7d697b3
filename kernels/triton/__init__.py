"""Kernels for NVIDIA cards. Products and sums are fused in every version of Triton, so that bits do
not change: 3.9 warns unless that is said, and 3.10 is to fuse them no longer by itself.
"""

import triton

triton.knobs.language.default_fp_fusion = True
