"""Imports of a rank on a CPU: its process, the kernels, and numba's own types and functions, which
the first kernel would import in each rank again: 0.15 s of CPU time for one.
"""

from __future__ import annotations

from ...kernels.cpu import column
from ...kernels.cpu.codegen.compiling import import_registries
from . import process

__all__ = ["column", "process"]

import_registries()
