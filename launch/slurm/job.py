"""A Slurm job that serves a recipe: what it asks Slurm for, checked against the recipe."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..recipe.hardware import load_hardware
from ..recipe.recipe import Recipe, RecipeError

# What a drain may take beyond cluster.drain_deadline: stopping the processes, Ray, and the moment
# Slurm takes to signal.
STOPPING_SECONDS = 60
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")
_GPUS = re.compile(r"gpu(?::[A-Za-z][\w.-]*)?(?::(?P<count>\d+))?(?:\(.*\))?")
_NAME = re.compile(r"[A-Za-z0-9._-]+")


@dataclass(frozen=True)
class JobOptions:
    """The options of ``launch slurm``, as given; None where they were left out."""

    nodes: int | None = None
    spare: int = 0
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    gres: str | None = None
    cpus: int | None = None
    mem: str | None = None
    constraint: str | None = None
    nodelist: str | None = None
    exclude: str | None = None
    reservation: str | None = None
    name: str | None = None
    folder: str | None = None
    scratch: str = "/tmp"
    port: int | None = None
    interface: str | None = None
    bin: str | None = None
    requeue: bool = False
    check: bool = True
    sbatch: tuple[str, ...] = ()
    container_image: str | None = None
    container_mounts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """A recipe and what its job asks for. ``recipe_name`` is a packaged recipe's name or a file's
    path, ``bin`` the folder of the commands on every node, None for the PATH of a container.
    """

    recipe: Recipe
    recipe_name: str
    model_path: Path
    overrides: tuple[str, ...]
    wishes: JobOptions
    gpus_per_node: int
    bin: Path | None

    @property
    def name(self) -> str:
        return self.wishes.name or f"lockstep-{Path(self.recipe_name).stem}"

    @property
    def num_nodes(self) -> int:
        return self.recipe.cluster.nodes + self.wishes.spare

    @property
    def drain_seconds(self) -> int:
        """How long before its time limit the job starts to drain."""
        return math.ceil(self.recipe.cluster.drain_deadline) + STOPPING_SECONDS

    @property
    def num_beside(self) -> int:
        """Processes beside the launcher: the controller and the frontends."""
        return 1 + self.recipe.frontend.processes


def make_job(
    recipe: Recipe,
    path: Path,
    model_path: Path,
    overrides: Sequence[str],
    wishes: JobOptions,
    bin_folder: Path,
) -> Job:
    """The job for ``recipe``, whose file is ``path``. Raises RecipeError with everything that does
    not fit.
    """
    found, gpus = _gpus(recipe, wishes)
    found += _contradictions(recipe, wishes)
    if found:
        raise RecipeError("the job does not fit the recipe\n" + "\n".join(f"  {line}" for line in found))
    packaged = Path(__file__).resolve().parent.parent.parent / "recipes"
    name = path.stem if path.parent.resolve() == packaged else str(path)
    if wishes.container_image is not None:
        folder = Path(wishes.bin) if wishes.bin else None
    else:
        folder = Path(wishes.bin or bin_folder).expanduser().absolute()
    return Job(recipe, name, model_path, tuple(overrides), wishes, gpus, folder)


def _gpus(recipe: Recipe, wishes: JobOptions) -> tuple[list[str], int]:
    """What is wrong with the GPUs asked for, and how many a node must have."""
    cluster = recipe.cluster
    device: str = cluster.device
    if device == "auto" and cluster.hardware is not None:
        device = load_hardware(cluster.hardware).device
    if device == "auto":
        return [
            "cluster.device = auto: a job must know whether to ask for GPUs; use cluster.device=cuda or cluster.device=cpu"
        ], 0
    wanted = cluster.ranks_per_node if device == "cuda" else 0
    if wishes.gres is None:
        return [], wanted
    match = next(
        (
            found
            for entry in wishes.gres.split(",")
            if (found := _GPUS.fullmatch(entry.removeprefix("gres/")))
        ),
        None,
    )
    offered = 0 if match is None else int(match["count"] or 1)
    if wanted and offered < wanted:
        return [
            f"--gres {wishes.gres}: {offered} GPUs on a node, but cluster.ranks_per_node = {wanted} needs one for each rank"
        ], wanted
    if offered and not wanted:
        return [
            f"--gres {wishes.gres}: asks for GPUs, but the recipe's ranks run on CPUs (cluster.device = {cluster.device})"
        ], wanted
    return [], wanted


def _contradictions(recipe: Recipe, wishes: JobOptions) -> list[str]:
    cluster = recipe.cluster
    seconds = None if wishes.time is None else parse_time(wishes.time)
    needed = math.ceil(cluster.drain_deadline) + STOPPING_SECONDS
    checks = (
        (
            wishes.nodes is not None and wishes.nodes != cluster.nodes,
            f"--nodes {wishes.nodes}: the recipe spreads its ranks over cluster.nodes = {cluster.nodes}; "
            f"leave --nodes out, or override the recipe with cluster.nodes={wishes.nodes}",
        ),
        (
            cluster.backend == "local",
            "cluster.backend = local: starts no processes on the job's nodes; use ray",
        ),
        (
            cluster.address is not None,
            f"cluster.address = {cluster.address}: the job starts a Ray cluster of its own; leave it out",
        ),
        (
            wishes.cpus is not None and wishes.cpus < cluster.ranks_per_node,
            f"--cpus {wishes.cpus}: fewer than cluster.ranks_per_node = {cluster.ranks_per_node}",
        ),
        (
            wishes.time is not None and seconds is None,
            f"--time {wishes.time}: should be as Slurm has it: minutes, hours:minutes:seconds, days-hours, or days-hours:minutes:seconds",
        ),
        (
            seconds is not None and seconds <= needed,
            f"--time {wishes.time}: no more than the {needed} s that draining may take "
            f"(cluster.drain_deadline = {cluster.drain_deadline:g}, and {STOPPING_SECONDS} to stop)",
        ),
        (
            wishes.name is not None and not _NAME.fullmatch(wishes.name),
            f"--name {wishes.name}: should be letters, digits, dots, dashes and underscores",
        ),
        (
            bool(wishes.container_mounts) and wishes.container_image is None,
            "--container-mount: needs --container-image",
        ),
        (
            recipe.frontend.port == 0 and wishes.port is None,
            "frontend.port = 0: nobody could tell where the job serves; name a port, or leave the key out for one of the job's own",
        ),
    )
    texts = {field: value for field, value in vars(wishes).items() if isinstance(value, str)}
    texts |= {f"sbatch {number}": value for number, value in enumerate(wishes.sbatch, start=1)}
    texts |= {
        f"container-mount {number}": value for number, value in enumerate(wishes.container_mounts, start=1)
    }
    unfit = [
        f"--{field.replace('_', '-')}: should be one line, is {value!r}"
        for field, value in texts.items()
        if "\n" in value or not value
    ]
    unfit += [
        f"--sbatch {value}: should be an option of sbatch, such as --comment=text"
        for value in wishes.sbatch
        if value[:1] != "-"
    ]
    return [text for wrong, text in checks if wrong] + unfit


def parse_time(text: str) -> int | None:
    """Seconds of a Slurm time limit, None where it is none: sbatch(1), --time."""
    match = _TIME.fullmatch(text)
    if match is None:
        return None
    first, second, third = (
        None if match[name] is None else int(match[name]) for name in ("first", "second", "third")
    )
    if match["days"] is not None:
        return int(match["days"]) * 86400 + (first or 0) * 3600 + (second or 0) * 60 + (third or 0)
    if third is not None:
        return (first or 0) * 3600 + (second or 0) * 60 + third
    return (first or 0) * 60 + (second or 0)
