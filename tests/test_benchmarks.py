"""Benchmarks, which no other test runs: that they can be imported with the product as it is."""

from __future__ import annotations

import ast
import csv
import importlib.util
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

FOLDER = Path(__file__).parent.parent / "benchmarks"


def test_every_script_can_be_imported() -> None:
    names = sorted(path.stem for path in FOLDER.glob("*.py"))
    assert {"bench_overlap", "chaos", "soak"} <= set(names)
    lines = "\n".join(f"import {name}" for name in names)
    done = subprocess.run(
        [sys.executable, "-c", lines], cwd=FOLDER, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_wheels_for_a_card_hold_all_that_ranks_and_servers_import() -> None:
    wheels = loaded("card_wheels")
    packages = metadata.packages_distributions()
    carried, assumed = set(wheels.carried()), {*wheels.ASSUMED, *needed_by(wheels.ASSUMED)}
    imported = set[str]()
    for folder in ("engine", "kernels", "launch", "moe", "parallel", "tests/engine/rank/device"):
        for path in (FOLDER.parent / folder).rglob("*.py"):
            imported |= imports_at_the_top(path)
    by_top = [packages.get(top, []) for top in imported - {"opentelemetry"}]  # of the extra `otel` alone
    needed = {canonicalize_name(name) for names in by_top for name in names}
    assert {"msgspec", "pyzmq", "llguidance", "pydantic", "fastapi", "uvicorn", "pytest"} <= needed
    assert needed - carried - assumed - {"lockstep"} == set()
    assert not carried & wheels.ASSUMED


def test_a_profile_of_decode_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = FOLDER.parent / "recipes" / "demo" / "model"
    few = ["--layers", "2", "--rows", "2", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", ["profile_steps", "--config", str(config), "--out", str(tmp_path), *few])
    loaded("profile_steps").main()
    assert len(json.loads((tmp_path / "profile.json").read_text())["traceEvents"]) > 100
    names, *rows = csv.reader((tmp_path / "profile.csv").read_text().splitlines())
    assert names == ["name", "calls a step", "us a step"] and len(rows) > 5
    assert [float(row[2]) for row in rows] == sorted((float(row[2]) for row in rows), reverse=True)


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def needed_by(names: set[str]) -> set[str]:
    """The direct dependencies of packages, which come with them."""
    found = [Requirement(text) for name in names for text in metadata.requires(name) or ()]
    return {canonicalize_name(each.name) for each in found if "extra" not in str(each.marker)}


def imports_at_the_top(path: Path) -> set[str]:
    """Packages that a module imports, but for those within functions, which may be optional."""
    found = set[str]()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.partition(".")[0])
    return found
