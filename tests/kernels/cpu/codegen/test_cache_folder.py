"""The folder of compiled kernels: one that can be written and locked, and nobody else's."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from pathlib import Path

import pytest

from lockstep.kernels.cpu.codegen import cache_folder as folders

SOURCES = Path(folders.__file__).parent


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    return place


def test_the_chosen_place_is_taken(tmp_path: Path) -> None:
    found = Path(folders.cache_folder(SOURCES, str(tmp_path / "mine"), "1"))
    assert found.parent == tmp_path / "mine" and found.is_dir()
    assert Path(folders.cache_folder(SOURCES, str(tmp_path / "mine"), "2")) != found, (
        "one folder for two versions"
    )


def test_a_place_that_cannot_be_written_leaves_a_temporary_one(
    tmp_path: Path, temporary: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()  # stands for a read-only home: no folder can be made in it
    found = Path(folders.cache_folder(SOURCES, str(tmp_path / "file"), "1"))
    assert found.parent == temporary / f"lockstep-{os.getuid()}"
    assert found.parent.stat().st_mode & 0o077 == 0
    assert str(tmp_path / "file") in caplog.text


def test_a_file_server_without_locks_leaves_a_temporary_place(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(file: object, kind: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert temporary in Path(folders.cache_folder(SOURCES, str(tmp_path), "1")).parents


def test_a_temporary_place_that_others_may_write_is_not_used(tmp_path: Path, temporary: Path) -> None:
    open_to_all = temporary / f"lockstep-{os.getuid()}"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    (tmp_path / "file").touch()
    found = Path(folders.cache_folder(SOURCES, str(tmp_path / "file"), "1"))
    assert open_to_all not in found.parents and found.parent.stat().st_mode & 0o077 == 0


def test_a_folder_of_another_compiler_is_found_by_the_same_rules(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "__file__", str(tmp_path / "file" / "module.py"))
    (tmp_path / "file").touch()  # the code cannot be written to
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Path(folders.kept_folder("triton")) == tmp_path / ".cache" / "lockstep" / "triton"
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    assert Path(folders.kept_folder("triton")) == temporary / f"lockstep-{os.getuid()}" / "triton"
