"""The text of an sbatch script for a job: a head of what this job asks for, and a body that is the
same for all.
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

from ..environment import ray_settings
from .job import Job

_BODY = Path(__file__).with_name("job.sh")
_UNSAFE = re.compile(r"[^A-Za-z0-9_@%+=:,./\-]")
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def script(job: Job) -> str:
    """The whole script, ready for sbatch."""
    return "\n".join(
        ["#!/bin/bash", *_comments(job), *_options(job), "", *_settings(job), "", _BODY.read_text()]
    )


def _comments(job: Job) -> list[str]:
    cluster = job.recipe.cluster
    spare = f" and {job.wishes.spare} spare" if job.wishes.spare else ""
    deadline = f"{cluster.drain_deadline:g} s"
    return [
        f"# Serves {job.recipe_name}: {_count(cluster.nodes, 'node')}{spare}, {_count(cluster.ranks_per_node, 'rank')} on each.",
        f"# Written by: {_written_by()}",
        "#",
        "#   sbatch SCRIPT                          prints the job's number, JOB below",
        "#   cat lockstep-JOB/endpoint              where it serves; GET /ready answers 200 once it does",
        "#   scancel --batch --signal=TERM JOB      drains: requests that run get"
        f" {deadline} (cluster.drain_deadline), new ones 503; then ends",
        "#   scancel JOB                            drains, too, but Slurm kills what is left after its own KillWait",
        "#",
        "# At its time limit the job drains by itself. Its exit code is that of launch: 0 stopped as asked, 1 a failure, 2 a bad recipe.",
    ]


def _written_by() -> str:
    return " ".join(["launch", *map(shlex.quote, sys.argv[1:])]).replace("\n", " ")


def _options(job: Job) -> list[str]:
    """The #SBATCH lines."""
    wishes = job.wishes
    given: list[tuple[str, object]] = [
        ("job-name", job.name),
        ("partition", wishes.partition),
        ("account", wishes.account),
        ("qos", wishes.qos),
        ("reservation", wishes.reservation),
        ("nodes", job.num_nodes),
        ("ntasks-per-node", 1),
        ("cpus-per-task", wishes.cpus),
        ("mem", wishes.mem or (0 if wishes.cpus is None else None)),
        ("gres", wishes.gres),
        ("gpus-per-node", job.gpus_per_node if job.gpus_per_node and wishes.gres is None else None),
        ("constraint", wishes.constraint),
        ("nodelist", wishes.nodelist),
        ("exclude", wishes.exclude),
        ("time", wishes.time),
        ("signal", f"B:TERM@{job.drain_seconds}"),
        ("output", f"{_folder(job)}lockstep-%j.out"),
    ]
    flags = ["--exclusive"] if wishes.cpus is None else []
    flags += ["--no-kill", "--requeue" if wishes.requeue else "--no-requeue", *wishes.sbatch]
    lines = [f"--{name}={value}" for name, value in given if value is not None] + flags
    return [f"#SBATCH {_quoted(line)}" for line in lines]


def _quoted(option: str) -> str:
    """An option as sbatch reads it from a script: double quotes and backslashes, nothing else of
    the shell.
    """
    if not _UNSAFE.search(option):
        return option
    return '"' + option.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _folder(job: Job) -> str:
    return "" if job.wishes.folder is None else f"{Path(job.wishes.folder).expanduser().absolute()}/"


def _settings(job: Job) -> list[str]:
    """Variables of the body."""
    recipe, wishes = job.recipe, job.wishes
    cluster = recipe.cluster
    host = "" if recipe.frontend.host in _LOOPBACK else recipe.frontend.host
    bin_folder = "" if job.bin is None else f"{job.bin}/"
    lines: list[tuple[str, str | list[str]]] = [
        ("recipe", ["--recipe", job.recipe_name, *job.overrides]),
        ("num_nodes", str(job.num_nodes)),
        ("cpus", [str(cluster.ranks_per_node + job.num_beside), str(cluster.ranks_per_node)]),
        ("gpus", str(job.gpus_per_node)),
        ("drain_deadline", f"{cluster.drain_deadline:g}"),
        ("bin", bin_folder),
        ("folder", _folder(job)),
        ("scratch", wishes.scratch),
        ("host", host),
        ("port", "" if wishes.port is None else str(wishes.port)),
        ("interface", wishes.interface or ""),
        ("check", "yes" if wishes.check else ""),
        ("image", job.wishes.container_image or ""),
        ("mounts", ",".join(_mounts(job))),
    ]
    notes = {
        "recipe": "what launch is told",
        "cpus": "Ray's count on the first node and on the others: a rank, the controller and a frontend take one each",
        "bin": "folder of launch, ray and python on every node; empty: those of PATH",
        "folder": "of the job's own folder; empty: where sbatch was called",
        "scratch": "of Ray's sockets on each node",
        "host": "that the server listens on; empty: the first node's address",
        "port": "of the server; empty: a free one",
        "interface": "whose address Ray and the server use; empty: the address that Slurm uses",
        "image": "of a container for every step; empty: none",
    }
    return [
        f"{_assignment(name, value)}{f'  # {notes[name]}' if name in notes else ''}" for name, value in lines
    ] + [
        "# Ray is this job's alone, keeps quiet, and leaves memory to the ranks.",
        *(f"export {name}={shlex.quote(value)}" for name, value in ray_settings().items()),
    ]


def _assignment(name: str, value: str | list[str]) -> str:
    if isinstance(value, list):
        return f"{name}=({' '.join(map(shlex.quote, value))})"
    return f"{name}={shlex.quote(value)}"


def _mounts(job: Job) -> list[str]:
    """The folders of recipe and model, beside those that were named."""
    if job.wishes.container_image is None:
        return []
    recipe = Path(job.recipe_name)
    folders = [recipe.parent] if recipe.is_absolute() else []
    return [*job.wishes.container_mounts, *(f"{folder}:{folder}" for folder in [*folders, job.model_path])]


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
