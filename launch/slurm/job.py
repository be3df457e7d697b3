"""A Slurm job that serves a recipe: its options, checked against the recipe."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..recipe.hardware import load_hardware
from ..recipe.recipe import Recipe, RecipeError

# Beyond cluster.drain_deadline: to stop the processes and Ray, and for Slurm to signal.
STOPPING_SECONDS = 60
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")
_GPUS = re.compile(r"gpu(?::[A-Za-z][\w.-]*)?(?::(?P<count>\d+))?(?:\(.*\))?")
_NAME = re.compile(r"[A-Za-z0-9._-]+")


@dataclass(frozen=True)
class JobOptions:
    """The options of ``launch slurm`` as given; None: not given."""

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
    bin_folder: str | None = None
    requeue: bool = False
    check: bool = True
    sbatch: tuple[str, ...] = ()
    container_image: str | None = None
    container_mounts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """A recipe and the options of its job.

    ``recipe_name``: a packaged name, or a path. ``bin``: folder of the commands on every node,
    None for the PATH of a container.
    """

    recipe: Recipe
    recipe_name: str
    model_path: Path
    overrides: tuple[str, ...]
    options: JobOptions
    gpus_per_node: int
    bin: Path | None

    @property
    def name(self) -> str:
        return self.options.name or f"lockstep-{Path(self.recipe_name).stem}"

    @property
    def num_nodes(self) -> int:
        return self.recipe.cluster.nodes + self.options.spare

    @property
    def drain_seconds(self) -> int:
        """Seconds before its time limit at which the job starts to drain."""
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
    options: JobOptions,
    bin_folder: Path,
) -> Job:
    """The job for ``recipe``, whose file is ``path``. Raises RecipeError with all problems."""
    found, gpus = _gpus(recipe, options)
    found += _contradictions(recipe, options)
    if found:
        raise RecipeError("the job does not fit the recipe\n" + "\n".join(f"  {line}" for line in found))
    packaged = Path(__file__).resolve().parent.parent.parent / "recipes"
    name = path.stem if path.parent.resolve() == packaged else str(path)
    if options.container_image is not None:
        folder = Path(options.bin_folder) if options.bin_folder else None
    else:
        folder = Path(options.bin_folder or bin_folder).expanduser().absolute()
    return Job(recipe, name, model_path, tuple(overrides), options, gpus, folder)


def _gpus(recipe: Recipe, options: JobOptions) -> tuple[list[str], int]:
    """Problems of the GPU options, and the GPUs that a node must have."""
    cluster = recipe.cluster
    device: str = cluster.device
    if device == "auto" and cluster.hardware is not None:
        device = load_hardware(cluster.hardware).device
    if device == "auto":
        text = "cluster.device = auto: the job must know whether to ask for GPUs"
        return [f"{text}; use cluster.device=cuda or cluster.device=cpu"], 0
    wanted = cluster.ranks_per_node if device == "cuda" else 0
    if options.gres is None:
        return [], wanted
    entries = [entry.removeprefix("gres/") for entry in options.gres.split(",")]
    match = next((found for entry in entries if (found := _GPUS.fullmatch(entry))), None)
    offered = 0 if match is None else int(match["count"] or 1)
    if wanted and offered < wanted:
        text = f"--gres {options.gres}: {offered} GPUs on a node, but cluster.ranks_per_node = {wanted}"
        return [f"{text} needs one for each rank"], wanted
    if offered and not wanted:
        text = f"--gres {options.gres}: asks for GPUs, but the recipe's ranks run on CPUs"
        return [f"{text} (cluster.device = {cluster.device})"], wanted
    return [], wanted


def _contradictions(recipe: Recipe, options: JobOptions) -> list[str]:
    """Options that do not fit the recipe or each other."""
    cluster = recipe.cluster
    checks = (
        (
            options.nodes is not None and options.nodes != cluster.nodes,
            f"--nodes {options.nodes}: the recipe spreads its ranks over cluster.nodes = {cluster.nodes}; "
            f"leave --nodes out, or override the recipe with cluster.nodes={options.nodes}",
        ),
        (
            cluster.backend == "local",
            "cluster.backend = local: starts no processes on the job's nodes; use ray",
        ),
        (
            cluster.address is not None,
            f"cluster.address = {cluster.address}: the job starts its own Ray cluster; leave it out",
        ),
        (
            options.cpus is not None and options.cpus < cluster.ranks_per_node,
            f"--cpus {options.cpus}: fewer than cluster.ranks_per_node = {cluster.ranks_per_node}",
        ),
        (
            options.name is not None and not _NAME.fullmatch(options.name),
            f"--name {options.name}: should be letters, digits, dots, dashes and underscores",
        ),
        (
            bool(options.container_mounts) and options.container_image is None,
            "--container-mount: needs --container-image",
        ),
        (
            recipe.frontend.port == 0 and options.port is None,
            "frontend.port = 0: the job's port would be unknown; name a port, or leave the key out",
        ),
    )
    return [text for wrong, text in checks if wrong] + _time_problems(recipe, options) + _unfit(options)


def _time_problems(recipe: Recipe, options: JobOptions) -> list[str]:
    """Problems of the time limit: Slurm cannot read it, or it leaves no time to serve before
    draining.
    """
    if options.time is None:
        return []
    seconds, drain = parse_time(options.time), recipe.cluster.drain_deadline
    if seconds is None:
        formats = "minutes, hours:minutes:seconds, days-hours, or days-hours:minutes:seconds"
        return [f"--time {options.time}: should be a time of Slurm: {formats}"]
    if seconds > (needed := math.ceil(drain) + STOPPING_SECONDS):
        return []
    parts = f"cluster.drain_deadline = {drain:g}, and {STOPPING_SECONDS} to stop"
    return [f"--time {options.time}: no more than the {needed} s that draining may take ({parts})"]


def _unfit(options: JobOptions) -> list[str]:
    """Problems of options whose text cannot be written into a script."""
    texts = {field: value for field, value in vars(options).items() if isinstance(value, str)}
    texts |= {f"sbatch {number}": value for number, value in enumerate(options.sbatch, start=1)}
    mounts = enumerate(options.container_mounts, start=1)
    texts |= {f"container-mount {number}": value for number, value in mounts}
    found = [
        f"--{field.replace('_', '-')}: should be one line, is {value!r}"
        for field, value in texts.items()
        if "\n" in value or not value
    ]
    return found + [
        f"--sbatch {value}: should be an option of sbatch, such as --comment=text"
        for value in options.sbatch
        if value[:1] != "-"
    ]


def parse_time(text: str) -> int | None:
    """Seconds of a Slurm time limit (sbatch(1), --time); None if it is not one."""
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
