"""A deployment of a recipe on Kubernetes: its options, checked against the recipe."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from ..recipe.hardware import load_hardware
from ..recipe.model_folder import model_directory
from ..recipe.recipe import Recipe, RecipeError

# Seconds for routers and kube-proxy to learn that a pod ends, before it gets the signal to drain.
LEAVING_SECONDS = 5
# Beyond cluster.drain_deadline: to stop the processes and Ray.
STOPPING_SECONDS = 60
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")
_QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?")
_RESOURCE = re.compile(r"[a-z0-9.-]+/[A-Za-z0-9._-]+=[1-9][0-9]*")
_SELECTOR = re.compile(r"[A-Za-z0-9._/-]+=[A-Za-z0-9._-]*")
_SECRETS = ("frontend.api_keys", "frontend.admin_key")


@dataclass(frozen=True)
class DeploymentOptions:
    """The options of ``launch k8s`` as given; None: not given."""

    image: str = "lockstep"
    name: str | None = None
    namespace: str = "default"
    replicas: int = 1
    max_replicas: int | None = None
    spare: int = 0
    cpus: str | None = None
    memory: str | None = None
    shm: str | None = None
    gpu_resource: str = "nvidia.com/gpu"
    rdma: tuple[str, ...] = ()
    model_claim: str | None = None
    kernel_claim: str | None = None
    node_selector: tuple[str, ...] = ()
    prometheus: str = "http://prometheus-operated.monitoring.svc:9090"
    endpoint_picker: str | None = None
    kuberay: bool = False


@dataclass(frozen=True)
class Deployment:
    """A recipe and the options of its deployment.

    ``recipe_name``: a packaged name, or the file's name, whose text ``recipe_text`` then is.
    ``model_path``: where a volume with the model is mounted; None: the image has it.
    """

    recipe: Recipe
    recipe_name: str
    recipe_text: str | None
    model_path: Path | None
    overrides: tuple[str, ...]
    options: DeploymentOptions
    gpus: int

    @property
    def name(self) -> str:
        return self.options.name or _default_name(self.recipe_name)

    @property
    def num_pods(self) -> int:
        """Pods of one cluster: a node each, and the spare ones."""
        return self.recipe.cluster.nodes + self.options.spare

    @property
    def num_beside(self) -> int:
        """Processes beside the launcher: the controller and the frontends."""
        return 1 + self.recipe.frontend.processes

    @property
    def ports(self) -> dict[str, int]:
        """The ports of the leader's pod by name: of the API, and of events for routers."""
        kv = self.recipe.kv_cache
        addresses = {"kv-events": kv.events, "kv-replay": kv.events_replay}
        ports = {name: urlsplit(address).port for name, address in addresses.items() if address != "off"}
        return {"http": self.recipe.frontend.port} | {name: port for name, port in ports.items() if port}

    @property
    def grace_seconds(self) -> int:
        """Seconds from the end of a pod's life until it is killed."""
        return LEAVING_SECONDS + math.ceil(self.recipe.cluster.drain_deadline) + STOPPING_SECONDS

    @property
    def has_keys(self) -> bool:
        """Whether the recipe's text is secret."""
        return bool(self.recipe.frontend.api_keys or self.recipe.frontend.admin_key)


def make_deployment(
    recipe: Recipe, path: Path, overrides: Sequence[str], options: DeploymentOptions
) -> Deployment:
    """The deployment of ``recipe``, whose file is ``path``. Raises RecipeError with all
    problems.
    """
    packaged = path.parent.resolve() == Path(__file__).resolve().parent.parent.parent / "recipes"
    name = path.stem if packaged else path.name
    device = recipe.cluster.device
    if device == "auto" and recipe.cluster.hardware is not None:
        device = load_hardware(recipe.cluster.hardware).device
    checks = (*_contradictions(recipe, device, options), *_malformed(options, name, overrides))
    if found := [text for wrong, text in checks if wrong]:
        lines = "\n".join(f"  {line}" for line in found)
        raise RecipeError(f"the deployment does not fit the recipe\n{lines}")
    model = model_directory(recipe, path.parent)
    in_image = packaged and model.is_relative_to(path.parent)
    return Deployment(
        recipe,
        name,
        None if packaged else path.read_text(),
        None if in_image else model,
        tuple(overrides),
        options,
        recipe.cluster.ranks_per_node if device == "cuda" else 0,
    )


def _contradictions(recipe: Recipe, device: str, options: DeploymentOptions) -> Iterator[tuple[bool, str]]:
    """(wrong, problem) of options that do not fit the recipe or each other."""
    cluster = recipe.cluster
    yield (
        device == "auto",
        "cluster.device = auto: the pods must know whether to ask for GPUs; "
        "use cluster.device=cuda or cluster.device=cpu",
    )
    yield (
        cluster.address is not None,
        f"cluster.address = {cluster.address}: the pods start their own Ray cluster; leave it out",
    )
    yield (
        cluster.backend == "local" and options.spare > 0,
        f"--spare {options.spare}: cluster.backend = local has no other nodes; use ray",
    )
    yield (
        recipe.frontend.port == 0,
        "frontend.port = 0: the Service would not know it; name a port, or leave the key out",
    )
    yield (
        options.max_replicas is not None and options.max_replicas < options.replicas,
        f"--max-replicas {options.max_replicas}: should be at least --replicas ({options.replicas})",
    )
    yield (
        options.kuberay and (options.replicas > 1 or options.max_replicas is not None),
        "--kuberay: a RayCluster is one cluster and cannot be scaled; leave --replicas and "
        "--max-replicas out",
    )


def _malformed(
    options: DeploymentOptions, recipe_name: str, overrides: Sequence[str]
) -> Iterator[tuple[bool, str]]:
    """(wrong, problem) of options that Kubernetes would refuse, or that would show a key."""
    for field in ("name", "namespace", "endpoint_picker"):
        value = getattr(options, field)
        what = f"--{field.replace('_', '-')} {value}"
        text = f"{what}: should be at most 40 lower-case letters, digits and dashes, a letter first"
        yield value is not None and not _NAME.fullmatch(value), text
    for field in ("cpus", "memory", "shm"):
        value = getattr(options, field)
        text = f"--{field} {value}: should be a quantity such as 16, 500m or 64Gi"
        yield value is not None and not _QUANTITY.fullmatch(value), text
    for value in options.rdma:
        yield not _RESOURCE.fullmatch(value), f"--rdma {value}: should be RESOURCE=COUNT, such as rdma/ib=8"
    for value in options.node_selector:
        yield not _SELECTOR.fullmatch(value), f"--node-selector {value}: should be LABEL=VALUE"
    for override in overrides:
        key = override.partition("=")[0]
        yield key in _SECRETS, f"{key}: would stand in a pod's command line; put it into a recipe file"
    own = _default_name(recipe_name)
    text = f"--name: {own}, made of the recipe's name, is no name of Kubernetes; give one"
    yield options.name is None and not _NAME.fullmatch(own), text


def _default_name(recipe_name: str) -> str:
    stem = recipe_name.removesuffix(".yaml").removesuffix(".yml").lower()
    return "lockstep-" + re.sub("[^a-z0-9]+", "-", stem).strip("-")
