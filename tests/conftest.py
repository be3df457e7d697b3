"""Settings for the whole suite."""

from __future__ import annotations

import os
import re
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

HERE = Path(__file__).parent
FIRST = ("launch", "serving", "engine")  # folders in the order of their longest tests


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks slow tests, and groups all for the workers of pytest-xdist, the longest first.

    Tests that start or share whole clusters, of Ray or of hosts, are a single group: one cluster at
    a time is as many processes as two cores carry. Others go by their files, whose fixtures they
    share (``--dist loadgroup``).
    """
    _mark_slow_tests(config, items)
    items.sort(key=lambda item: (not _starts_clusters(item), _rank(item)))
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            group = "clusters" if _starts_clusters(item) else item.location[0]
            item.add_marker(pytest.mark.xdist_group(group))


def _mark_slow_tests(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Those that ``slow.txt`` names; an entry that names none of its file's tests is an error."""
    names = {item: item.nodeid for item in items}
    files = {name.partition("::")[0] for name in names.values()}
    whole_files = not any("::" in argument for argument in config.args)
    for line in (HERE / "slow.txt").read_text(encoding="utf-8").splitlines():
        _, _, entry = line.partition(" ")
        if line.startswith("#") or entry.partition("::")[0] not in files:
            continue
        pattern = re.compile(re.escape(entry).replace(r"\*", ".*") + r"($|::|\[)")
        found = [item for item, name in names.items() if pattern.match(name)]
        if whole_files and not found:
            raise pytest.UsageError(f"tests/slow.txt: no test is called {entry}")
        for item in found:
            item.add_marker(pytest.mark.slow)


def _starts_clusters(item: pytest.Item) -> bool:
    marked = any(item.get_closest_marker(name) for name in ("ray", "hosts", "slurm"))
    return marked or item.path.parent.name == "serving"


def _rank(item: pytest.Item) -> int:
    folder = item.path.relative_to(HERE).parts[0]
    return FIRST.index(folder) if folder in FIRST else len(FIRST)
