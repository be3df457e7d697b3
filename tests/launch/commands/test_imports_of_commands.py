"""Modules that a command may not import: a user waits for each of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TORCH = {"torch", "ray", "transformers", "tokenizers", "numba", "triton", "llguidance"}
SERVING = {"fastapi", "uvicorn", "prometheus_client", "httpx", "asyncio"}
DATA = {"numpy", "msgspec", "zmq", "yaml", "llvmlite", "rich"}

DEMO = ["--recipe", "demo", "cluster.backend=local", "frontend.port=0"]
TRACE = ["--trace", "poisson:rate=20,input=20,output=3,count=5"]
COMMANDS = {
    "--help": (["--help"], TORCH | SERVING | DATA),
    "plan --help": (["plan", "--help"], TORCH | SERVING | DATA),
    "plan": (["plan", *DEMO], TORCH | SERVING | {"zmq", "numpy"}),
    "plan --json": (["plan", *DEMO, "--json"], TORCH | SERVING | {"zmq", "numpy"}),
    "check": (["check", *DEMO], TORCH | SERVING | {"zmq", "numpy"}),
    "slurm": (["slurm", "--recipe", "demo"], TORCH | SERVING | {"zmq", "numpy", "llvmlite"}),
    "bench --help": (["bench", "--help"], TORCH | SERVING | DATA),
    "simulate": (["simulate", "--recipe", "demo", *TRACE], TORCH | SERVING | {"zmq"}),
}

# Runs a command, then prints the modules that it has imported.
PROGRAM = """
import contextlib, io, sys
from lockstep.launch.cli import main
code = None
try:
    with contextlib.redirect_stdout(io.StringIO()):
        main()
except SystemExit as leave:
    code = leave.code
print(code or 0, *sys.modules)
"""


def imported_by(arguments: list[str], folder: Path) -> set[str]:
    """Modules that the command has imported at its end."""
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        cwd=folder,
    )
    code, *modules = result.stdout.split()
    assert code in ("0", "3"), result.stderr  # 3: warnings of launch check
    return set(modules)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_imports_only_what_it_needs(name: str, tmp_path: Path) -> None:
    arguments, forbidden = COMMANDS[name]
    assert not imported_by(arguments, tmp_path) & forbidden


def test_the_imports_are_seen(tmp_path: Path) -> None:
    assert {"llvmlite", "yaml", "pydantic"} <= imported_by(["plan", *DEMO], tmp_path)
