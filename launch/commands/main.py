"""The command line: ``launch --recipe R [key=value ...]`` serves, other commands are named.

Exit status: 0 done as asked, 1 failed, 2 bad recipe or usage. Commands import what they need when
they run, so that ``launch --help`` is quick.
"""

from __future__ import annotations

from . import bench, canary, check, kubernetes, load, plan, serve, simulate, slurm, timeline
from .app import app

COMMANDS = (
    serve,
    plan,
    check,
    simulate,
    slurm,
    kubernetes,
    canary,
    load,
    bench,
    timeline,
)  # importing a module registers its command


def run() -> None:
    """Runs the command that ``sys.argv`` asks for."""
    app(prog_name="launch")
