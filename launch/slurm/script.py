"""The text of an sbatch script: a head with the options of this job, and a body equal for all."""

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
    spare = f" and {job.options.spare} spare" if job.options.spare else ""
    deadline = f"{cluster.drain_deadline:g} s"
    return [
        f"# Serves {job.recipe_name}: {_count(cluster.nodes, 'node')}{spare}, "
        f"{_count(cluster.ranks_per_node, 'rank')} on each.",
        f"# Written by: {_written_by()}",
        "#",
        "#   sbatch SCRIPT                          prints the job's number, JOB below",
        "#   cat lockstep-JOB/endpoint              prints its URL; GET /ready answers 200 once it serves",
        f"#   scancel --batch --signal=TERM JOB      drains: running requests get {deadline}",
        "#                                          (cluster.drain_deadline), new ones 503; then ends",
        "#   scancel JOB                            drains too, but Slurm kills the rest after its KillWait",
        "#",
        "# The job drains before its time limit. It ends with the exit code of launch:",
        "# 0 stopped as asked, 1 failed, 2 bad recipe.",
    ]


def _written_by() -> str:
    return " ".join(["launch", *map(shlex.quote, sys.argv[1:])]).replace("\n", " ")


def _options(job: Job) -> list[str]:
    """The #SBATCH lines."""
    options = job.options
    given: list[tuple[str, object]] = [
        ("job-name", job.name),
        ("partition", options.partition),
        ("account", options.account),
        ("qos", options.qos),
        ("reservation", options.reservation),
        ("nodes", job.num_nodes),
        ("ntasks-per-node", 1),
        ("cpus-per-task", options.cpus),
        ("mem", options.mem or (0 if options.cpus is None else None)),
        ("gres", options.gres),
        ("gpus-per-node", job.gpus_per_node if job.gpus_per_node and options.gres is None else None),
        ("constraint", options.constraint),
        ("nodelist", options.nodelist),
        ("exclude", options.exclude),
        ("time", options.time),
        ("signal", f"B:TERM@{job.drain_seconds}"),
        ("output", f"{_folder(job)}lockstep-%j.out"),
    ]
    flags = ["--exclusive"] if options.cpus is None else []
    flags += ["--no-kill", "--requeue" if options.requeue else "--no-requeue", *options.sbatch]
    lines = [f"--{name}={value}" for name, value in given if value is not None] + flags
    return [f"#SBATCH {_quoted(line)}" for line in lines]


def _quoted(option: str) -> str:
    """Quotes an option for sbatch, which reads only double quotes and backslashes."""
    if not _UNSAFE.search(option):
        return option
    return '"' + option.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _folder(job: Job) -> str:
    return "" if job.options.folder is None else f"{Path(job.options.folder).expanduser().absolute()}/"


def _settings(job: Job) -> list[str]:
    """Assignments of the body's variables."""
    recipe, options = job.recipe, job.options
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
        ("scratch", options.scratch),
        ("host", host),
        ("port", "" if options.port is None else str(options.port)),
        ("interface", options.interface or ""),
        ("check", "yes" if options.check else ""),
        ("image", job.options.container_image or ""),
        ("mounts", ",".join(_mounts(job))),
    ]
    notes = {
        "recipe": "arguments of launch",
        "cpus": "CPUs for Ray on the first node and on the others: one per rank, controller and frontend",
        "bin": "folder of launch, ray and python on every node; empty: PATH",
        "folder": "parent of the job's folder; empty: the folder of sbatch",
        "scratch": "parent of the folder for Ray's sockets on each node",
        "host": "address the server listens on; empty: the first node's",
        "port": "port of the server; empty: a free one",
        "interface": "network interface of Ray and the server; empty: that of Slurm's address",
        "image": "container image for every step; empty: none",
    }
    found = []
    for name, value in lines:
        note = f"  # {notes[name]}" if name in notes else ""
        found.append(f"{_assignment(name, value)}{note}")
    found.append("# Ray belongs to this job alone, sends no statistics, and leaves memory to the ranks.")
    return found + [f"export {name}={shlex.quote(value)}" for name, value in ray_settings().items()]


def _assignment(name: str, value: str | list[str]) -> str:
    if isinstance(value, list):
        return f"{name}=({' '.join(map(shlex.quote, value))})"
    return f"{name}={shlex.quote(value)}"


def _mounts(job: Job) -> list[str]:
    """The mounts of the options, then the folders of recipe and model."""
    if job.options.container_image is None:
        return []
    recipe = Path(job.recipe_name)
    folders = [recipe.parent] if recipe.is_absolute() else []
    return [*job.options.container_mounts, *(f"{folder}:{folder}" for folder in [*folders, job.model_path])]


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
