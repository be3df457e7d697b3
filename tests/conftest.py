"""Settings for the whole suite."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
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
# torch.use_deterministic_algorithms, which fills fresh memory with NaN (support.kernels.poison),
# asks for this on a card.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# An example may take as long as a busy machine makes it take: by the clock Hypothesis would fail
# one of 200 ms.
settings.register_profile("lockstep", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("lockstep")

FIRST = ("launch", "serving", "engine")  # folders in the order of their longest tests


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Groups tests for the workers of pytest-xdist (``--dist loadgroup``), the longest first.

    Tests that start or share whole clusters, of Ray or of hosts, are a single group: one cluster at
    a time is as many processes as two cores carry. Others go by their files, whose fixtures they
    share.
    """
    items.sort(key=lambda item: (not _starts_clusters(item), _rank(item)))
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            group = "clusters" if _starts_clusters(item) else item.location[0]
            item.add_marker(pytest.mark.xdist_group(group))


def _starts_clusters(item: pytest.Item) -> bool:
    marked = any(item.get_closest_marker(name) for name in ("ray", "hosts", "slurm"))
    return marked or item.path.parent.name == "serving"


def _rank(item: pytest.Item) -> int:
    folder = item.path.relative_to(Path(__file__).parent).parts[0]
    return FIRST.index(folder) if folder in FIRST else len(FIRST)
