"""Settings for the whole suite."""

from __future__ import annotations

import gc
import os
import re
import ssl
import sys
from collections import Counter
from collections.abc import Generator, Iterator
from functools import cache
from pathlib import Path
from typing import Any

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
CLUSTERS, SERVING = "clusters", "serving"  # the groups that take longest

_new_tls_context = ssl.create_default_context


@cache
def _tls_context(certificates: tuple[str | None, ...], given: tuple[Any, ...], named: Any) -> ssl.SSLContext:
    return _new_tls_context(*given, **dict(named))


def _shared_tls_context(*given: Any, **named: Any) -> ssl.SSLContext:
    """Every client of plain HTTP makes a TLS context, which takes 20 ms: those that are alike are
    one.
    """
    certificates = os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
    return _tls_context(certificates, given, tuple(named.items()))


ssl.create_default_context = _shared_tls_context


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Imports and collects without garbage collections, a quarter of the time: all that is made
    stays.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks slow tests, and puts files that take long first, so that the workers end together."""
    _mark_slow_tests(config, items)
    weights = Counter[str]()
    for seconds, entry in _slow_entries():
        weights[entry.partition("::")[0]] += seconds
    items.sort(key=lambda item: (_turn(_group_of(item.nodeid)), -weights[item.nodeid.partition("::")[0]]))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Each worker takes a group after the other. The marks of xdist's own groups are lost with
    pytest 9.2 and pytest-xdist 3.8.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group_of(nodeid)

    return Groups(config, log)


@cache
def _group_of(nodeid: str) -> str:
    """Files that start clusters of Ray or of hosts are one group, those that share served clusters
    another: two clusters at a time are as many processes as two cores carry.
    """
    file = nodeid.partition("::")[0]
    if "tests/serving/" in file:
        return SERVING
    text = (HERE.parent / file).read_text(encoding="utf-8")
    return CLUSTERS if re.search(r"mark\.ray\b|\*needs_", text) else file


def _turn(group: str) -> int:
    return (CLUSTERS, SERVING, group).index(group)


def _slow_entries() -> Iterator[tuple[float, str]]:
    """The lines of ``slow.txt``: seconds, and the name that tests begin with."""
    for line in (HERE / "slow.txt").read_text(encoding="utf-8").splitlines():
        seconds, _, entry = line.partition(" ")
        if not line.startswith("#"):
            yield float(seconds), entry


def _mark_slow_tests(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Those that ``slow.txt`` names; an entry that names none of its file's tests is an error."""
    names = {item: item.nodeid for item in items}
    files = {name.partition("::")[0] for name in names.values()}
    whole_files = not any("::" in argument for argument in config.args)
    for _, entry in _slow_entries():
        if entry.partition("::")[0] not in files:
            continue
        pattern = re.compile(re.escape(entry).replace(r"\*", ".*") + r"($|::|\[)")
        found = [item for item, name in names.items() if pattern.match(name)]
        if whole_files and not found:
            raise pytest.UsageError(f"tests/slow.txt: no test is called {entry}")
        for item in found:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _no_test_leaves_ray_on_one_machine() -> Iterator[None]:
    """A test that prepares a Ray of this machine alone leaves no setting of it to the next one,
    whose Ray may have several hosts.
    """
    yield
    os.environ.pop("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", None)


@pytest.fixture(scope="session", autouse=True)
def _workers_compile_beside_each_other() -> Iterator[None]:
    """Kernels that nobody has compiled before: a worker does not wait while the other compiles
    another one. Modules of kernels have been imported with the tests by now, if any needs them.
    """
    arrays = sys.modules.get("lockstep.kernels.cpu.codegen.arrays")
    if arrays is None:
        yield
    else:
        with arrays.COMPILE_LOCK.shared():
            yield
