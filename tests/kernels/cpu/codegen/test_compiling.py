"""A rank's progress report while kernels are compiled; only one process compiles."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from pathlib import Path

import numba
import pytest

from lockstep.kernels.cpu.codegen import arrays as cpu_arrays, compiling


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cpu_arrays, "CACHE_FOLDER", str(tmp_path / "kept"))
    return tmp_path / "kept"


def test_every_compiled_kernel_is_reported_once(folder: Path) -> None:
    @numba.njit
    def inner(x):  # type: ignore[no-untyped-def]
        return x + 1

    @numba.njit
    def outer(x):  # type: ignore[no-untyped-def]
        return inner(x) * 2

    told: list[str] = []
    with compiling.alone_in_compiling(told.append):
        assert outer(3) == 8
        assert outer(4) == 10
    assert [line.partition("number ")[2] for line in told] == ["1, outer", "2, inner"]
    outer(0.5)
    assert len(told) == 2, "told of what was compiled afterwards"


def test_a_second_process_reports_that_it_waits_and_waits(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "_READS", 0.1)
    folder.mkdir()
    told: list[str] = []
    inside, waits = threading.Event(), threading.Event()

    def second() -> None:
        with compiling.alone_in_compiling(lambda line: (told.append(line), waits.set())):
            inside.set()

    thread = threading.Thread(target=second)
    with (folder / "compiling").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread.start()
        assert waits.wait(60), "nothing was said"
        assert not inside.wait(0.2), "two are compiling"
    assert inside.wait(60)
    thread.join()
    assert len(told) == 1
    assert "another process" in told[0]


def test_kernels_unused_for_a_month_are_removed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, fresh, old, strange = (
        folder / name for name in ("numba-mine", "numba-fresh", "numba-old", "strange")
    )
    for place in (fresh, old, strange):
        place.mkdir(parents=True)
        (place / "compiling").touch()
    for place in (old, strange):
        os.utime(place / "compiling", (time.time() - 40 * 86400.0,) * 2)
    monkeypatch.setattr(cpu_arrays, "CACHE_FOLDER", str(mine))
    with compiling.alone_in_compiling(print):
        assert sorted(place.name for place in folder.iterdir()) == ["numba-fresh", "numba-mine", "strange"]


def test_a_folder_that_cannot_be_made_stops_no_process(folder: Path) -> None:
    folder.write_text("in the way")
    with compiling.alone_in_compiling(print):
        pass
