"""Settings for the whole suite."""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import HealthCheck, settings

from lockstep.launch.environment import isa_settings

# Tests spawn several processes on few cores; torch's own threads would only fight over them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Before anything imports Triton: without an NVIDIA card its kernels run in the interpreter, on CPU
# tensors.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# The suite as it is on a lesser CPU, here: avx512 is without AVX512-BF16 and AMX, avx2 without
# AVX-512. Every process below inherits it.
os.environ.update(isa_settings(os.environ.get("LOCKSTEP_TEST_ISA", "auto")))
# torch.use_deterministic_algorithms, which fills fresh memory with NaN (support.kernels.poison), asks for
# this on a card.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# An example may take as long as a busy machine makes it take: by the clock Hypothesis would fail
# one of 200 ms.
settings.register_profile("lockstep", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("lockstep")
