"""Benchmarks, which no other test runs: that they can be imported with the product as it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "benchmarks"


def test_every_script_can_be_imported() -> None:
    names = sorted(path.stem for path in FOLDER.glob("*.py"))
    assert {"bench_overlap", "chaos", "soak"} <= set(names)
    lines = "\n".join(f"import {name}" for name in names)
    done = subprocess.run(
        [sys.executable, "-c", lines], cwd=FOLDER, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
