"""The circumstances that rows of the benchmarks are kept with: the hardware and the commit."""

from __future__ import annotations

import multiprocessing
import platform
import subprocess
from pathlib import Path


def hardware() -> str:
    """The CPU's name, the number of cores and the kernel."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    model = next(models, platform.machine())
    return f"{model}, {multiprocessing.cpu_count()} cores, {platform.system()} {platform.release()}"


def commit() -> str:
    """The commit of the checkout; ``unknown`` outside a repository."""
    root = str(Path(__file__).resolve().parent.parent)
    command = ["git", "-C", root, "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
