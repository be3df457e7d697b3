"""Benchmarks, which no other test runs: that they can be imported with the product as it is."""

from __future__ import annotations

import ast
import csv
import importlib.util
import json
import os
import re
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
    few = ["--layers", "2", "--rows", "2", "--steps", "2", "--host", "1,3"]
    monkeypatch.setattr(sys, "argv", ["profile_steps", "--config", str(config), "--out", str(tmp_path), *few])
    loaded("profile_steps").main()
    assert len(json.loads((tmp_path / "profile.json").read_text())["traceEvents"]) > 100
    names, *rows = csv.reader((tmp_path / "profile.csv").read_text().splitlines())
    assert names == ["name", "calls a step", "us a step"] and len(rows) > 5
    assert [float(row[2]) for row in rows] == sorted((float(row[2]) for row in rows), reverse=True)
    names, *rows = csv.reader((tmp_path / "host_steps.csv").read_text().splitlines())
    assert names == ["rows", "layers", "part", "p20_ms", "p50_ms", "p80_ms"]
    assert [row[:3] for row in rows] == [[n, "2", part] for n in "13" for part in ("plan", "submit")]
    assert all(0 < float(row[3]) <= float(row[4]) <= float(row[5]) for row in rows)


STAND_IN = r"""#!/bin/bash
echo "$*" >> "$CALLS"
case "$*" in
    *is_available*) echo cuda ;;
    *cluster.backend=local*) exec /bin/sleep 60 ;;
    *bench.parity*) exit 1 ;;
    *pytest*on_card*) exit 7 ;;
    *bench\ --url*concurrency\ 1,8*) exit 1 ;;
esac
"""


def test_phases_on_a_card_go_on_after_failures(tmp_path: Path) -> None:
    """The script under a stand-in for Python, which measures nothing."""
    scripts = {"python": STAND_IN, "sleep": "#!/bin/bash\n", "nvidia-smi": "#!/bin/bash\necho NVIDIA H200\n"}
    for name, text in scripts.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    out, calls = tmp_path / "out", tmp_path / "calls"
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls)}
    command = ["bash", "benchmarks/on_card.sh", str(out), "commit", str(tmp_path / "python")]
    done = subprocess.run(
        command, cwd=FOLDER.parent, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    _, *rows = csv.reader((out / "phases.csv").read_text().splitlines())
    status = {name: int(code) for name, code, _ in rows}
    assert list(status) == [
        *("versions", "wheels", "parity", "executor", "demo-cpu", "demo-cuda", "shape", "profile"),
        *("rows-first", "rows-1", "plots", "tests", "tuning"),
    ], done.stderr[-2000:]
    failed = {name: code for name, code in status.items() if code}
    assert failed == {"parity": 1, "executor": 7, "shape": 1}
    limits = {
        name: int(limit)
        for name, limit in re.findall(r"== (\S+): at most (\d+) s", (out / "log.txt").read_text())
    }
    assert sum(limits[name] for name in list(status)[: list(status).index("rows-1")]) <= 560
    said = calls.read_text()
    assert "--concurrency 1,8,32,64,128,256" in said and "--input 8192" in said, "what follows a failure runs"
    assert "cluster.hardware=h200" in said and said.index("--first") < said.index("bench.plot")


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
