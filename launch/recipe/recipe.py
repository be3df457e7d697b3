"""The recipe: everything a cluster is told, checked before anything starts.

A recipe is a YAML file of sections and keys; ``key=value`` on the command line overrides one key.
Every key is described once, here. What is wrong is reported all at once, by the path of the key
(``RecipeError``).
"""

from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from ...parallel.mesh import Mesh

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B|B)?", re.IGNORECASE)
_UNITS = {"": 1, "b": 1} | {f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", start=1)}
_UNITS |= {f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", start=1)}


class RecipeError(ValueError):
    """A recipe that cannot be run; the message lists every problem."""


def _none_for_auto(value: object) -> object:
    """``auto`` in YAML is None here, and a null in YAML is an error."""
    if value == "auto":
        return None
    if value is None:
        raise ValueError("should be auto or a whole number")
    return value


def _switch(value: object) -> object:
    """YAML 1.1 reads a bare ``on`` and ``off`` as booleans."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def parse_size(value: object) -> object:
    """Bytes from a number or from text such as 512MiB or 1.5GB; anything else is returned as it
    is.
    """
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        if isinstance(value, str):
            raise ValueError("should be auto, a number of bytes, or a size such as 512MiB or 80GB")
        return value
    return int(Decimal(match[1]) * _UNITS[(match[2] or "").lower()])


def _size_or_auto(value: object) -> object:
    return None if value == "auto" else parse_size(value)


AutoInt = Annotated[int | None, BeforeValidator(_none_for_auto)]
Size = Annotated[int, BeforeValidator(parse_size)]
AutoSize = Annotated[int | None, BeforeValidator(_size_or_auto)]
Strings = Annotated[tuple[str, ...], Field(strict=False)]


class Part(BaseModel):
    """Base of the sections: unknown keys are errors, values are not converted, nothing changes
    later.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, validate_default=False, allow_inf_nan=False
    )


class Model(Part):
    path: str = Field(min_length=1, description="Hugging Face directory; relative to the recipe's own folder")
    config: str | None = Field(
        default=None,
        min_length=1,
        description="folder whose config.json launch plan reads while path is not there",
    )
    served_name: str | None = Field(
        default=None, min_length=1, description="name in the API; the directory's name if left out"
    )
    dtype: Literal["auto", "bf16", "fp32"] = Field(
        default="auto", description="of weights and activations; auto: the checkpoint's own"
    )
    max_len: AutoInt = Field(
        default=None, ge=2, description="prompt and output of a request; auto: what model and memory allow"
    )


class Cluster(Part):
    backend: Literal["ray", "local"] = Field(
        default="ray", description="ray, or plain processes on this machine"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: cuda where this machine has it"
    )
    hardware: str | None = Field(
        default=None, min_length=1, description="hardware profile that launch plan computes with"
    )
    nodes: int = Field(default=1, ge=1, le=4096, description="machines the ranks are spread over")
    ranks_per_node: int = Field(
        default=1, ge=1, le=64, description="ranks (one GPU each, or a share of the cores) on each of them"
    )
    threads: AutoInt = Field(
        default=None, ge=1, description="CPU threads per rank; auto: the node's cores divided by its ranks"
    )
    isa: Literal["auto", "avx512", "avx2"] = Field(
        default="auto", description="the most that ranks on x86 CPUs compute with"
    )
    address: str | None = Field(
        default=None, description="a running Ray cluster to join; a new one on this machine if left out"
    )
    log_dir: str | None = Field(
        default=None, description="folder for the logs of runs; the system's temporary one if left out"
    )
    start_deadline: float = Field(
        default=600.0, gt=0, description="seconds until every rank must have loaded its weights"
    )
    drain_deadline: float = Field(
        default=30.0, ge=0, description="seconds that running requests get to finish after SIGTERM or Ctrl-C"
    )
    collective_deadline: float = Field(
        default=60.0, gt=0, description="seconds after which a rank gives up on an exchange with the others"
    )


class Parallel(Part):
    tensor: int = Field(default=1, ge=1, description="ranks that share attention and dense layers")
    pipeline: int = Field(default=1, ge=1, description="stages of layers")


class Experts(Part):
    dispatch: Literal["auto", "local", "all_gather", "all_to_all"] = Field(
        default="auto", description="how tokens reach their experts"
    )
    redundant: int = Field(default=0, ge=0, description="expert slots beyond one per expert, for replicas")
    balance: Annotated[Literal["auto", "off", "on"], BeforeValidator(_switch)] = Field(
        default="auto", description="moving experts by load"
    )


class KvCache(Part):
    dtype: Literal["auto", "bf16", "fp32", "fp8"] = Field(
        default="auto", description="of pages; auto: fp8 on GPUs, else as activations"
    )
    page_size: int = Field(default=64, ge=1, le=1024, description="tokens per page, a power of two")
    memory: AutoSize = Field(
        default=None, ge=1, le=2**50, description="bytes of pages per rank (512MiB, 60GB); auto: what is free"
    )
    prefix_caching: bool = Field(
        default=True, description="keep pages of finished requests for equal prefixes"
    )
    host_memory: Size = Field(
        default=0, ge=0, le=2**50, description="bytes of host memory per rank for evicted pages"
    )


class Scheduler(Part):
    max_batch_tokens: int = Field(default=8192, ge=1, description="tokens a rank computes in a step")
    max_running: int = Field(
        default=128, ge=1, le=4096, description="running requests per data-parallel rank"
    )
    max_queue: int = Field(
        default=1024, ge=1, description="waiting requests before new ones are answered 503"
    )
    inter_token_target: float = Field(
        default=0.2, gt=0, description="seconds between tokens that prefill may not stretch a step beyond"
    )
    checksum_every: int = Field(
        default=64, ge=1, description="steps between comparisons of the ranks' state with the planner's"
    )


class Frontend(Part):
    host: str = Field(
        default="127.0.0.1", min_length=1, description="address that is listened on; 0.0.0.0 for all"
    )
    port: int = Field(default=8000, ge=0, le=65535, description="0 takes a free one")
    processes: int = Field(default=1, ge=1, le=64, description="frontend processes behind the port")
    api_keys: Strings = Field(default=(), description="accepted bearer keys; none: everyone is")
    admin_key: str | None = Field(
        default=None, min_length=1, description="bearer key of /admin; without one /admin is closed"
    )
    tool_parser: Annotated[
        Literal["auto", "off", "deepseek_v3", "glm4", "hermes", "kimi_k2", "mistral"],
        BeforeValidator(_switch),
    ] = Field(default="auto", description="how the model writes tool calls; auto: as its chat template does")
    reasoning_parser: Annotated[Literal["auto", "off", "think", "mistral"], BeforeValidator(_switch)] = Field(
        default="auto", description="how the model writes its reasoning; auto: as its chat template does"
    )


class Recipe(Part):
    """The whole recipe. ``verified``, ``deterministic`` and ``recording`` stand at the top level,
    all else in sections.
    """

    model: Model
    cluster: Cluster = Cluster()
    parallel: Parallel = Parallel()
    experts: Experts = Experts()
    overlap: Annotated[Literal["auto", "off", "on"], BeforeValidator(_switch)] = Field(
        default="auto", description="two microbatches, one computing while the other exchanges"
    )
    kv_cache: KvCache = KvCache()
    scheduler: Scheduler = Scheduler()
    frontend: Frontend = Frontend()
    deterministic: bool = Field(
        default=False, description="equal logits for a request whatever the batch and the layout"
    )
    recording: str | None = Field(
        default=None, min_length=1, description="file that every event and plan is recorded to"
    )
    verified: str | None = Field(
        default=None, min_length=1, description="on what the recipe has really run; for readers only"
    )

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.cluster.nodes * self.cluster.ranks_per_node

    @property
    def data(self) -> int:
        """Data-parallel size: what tensor and pipeline leave of the world."""
        return self.world // (self.parallel.tensor * self.parallel.pipeline)

    @property
    def mesh(self) -> Mesh:
        return Mesh(pipeline=self.parallel.pipeline, data=self.data, tensor=self.parallel.tensor)


def problems(recipe: Recipe) -> list[str]:
    """What is wrong with a well-formed recipe: contradictions between keys, then values that do not
    work yet.
    """
    return contradictions(recipe) + not_yet(recipe)


def contradictions(recipe: Recipe) -> list[str]:
    """Keys that exclude each other, whatever the version."""
    cluster, scheduler, kv = recipe.cluster, recipe.scheduler, recipe.kv_cache
    share = recipe.parallel.tensor * recipe.parallel.pipeline
    max_len, keys = recipe.model.max_len, recipe.frontend
    checks = (
        (
            cluster.backend == "local" and cluster.nodes > 1,
            f"cluster.nodes = {cluster.nodes}: cluster.backend = local runs on one node; use ray for more",
        ),
        (
            cluster.backend == "local" and cluster.address is not None,
            f"cluster.address = {cluster.address}: cluster.backend = local joins no Ray cluster",
        ),
        (
            recipe.world % share != 0,
            f"parallel.tensor x parallel.pipeline = {share}: does not divide the {recipe.world} ranks of "
            f"cluster.nodes ({cluster.nodes}) x cluster.ranks_per_node ({cluster.ranks_per_node})",
        ),
        (
            scheduler.max_batch_tokens < scheduler.max_running,
            f"scheduler.max_batch_tokens = {scheduler.max_batch_tokens}: below scheduler.max_running ({scheduler.max_running}); "
            "every running request takes a token of each step",
        ),
        (
            kv.page_size & (kv.page_size - 1) != 0,
            f"kv_cache.page_size = {kv.page_size}: should be a power of two",
        ),
        (
            max_len is not None and kv.memory is not None and kv.memory < max_len,
            f"kv_cache.memory = {kv.memory}: fewer bytes than model.max_len ({max_len}) has tokens",
        ),
        (
            recipe.experts.dispatch == "local" and recipe.world > 1,
            f"experts.dispatch = local: keeps all experts on one rank, but there are {recipe.world} "
            f"(cluster.nodes {cluster.nodes} x cluster.ranks_per_node {cluster.ranks_per_node}); use auto, all_gather or all_to_all",
        ),
        (
            keys.admin_key is not None and keys.admin_key in keys.api_keys,
            "frontend.admin_key: is also one of frontend.api_keys; every user would be an administrator",
        ),
    )
    return [text for wrong, text in checks if wrong]


def not_yet(recipe: Recipe) -> list[str]:
    """What a recipe may ask for and this version cannot do: launching refuses it, ``launch plan``
    computes it and says so.
    """
    checks = (
        (recipe.parallel.tensor > 1, f"parallel.tensor = {recipe.parallel.tensor}", "1"),
        (recipe.parallel.pipeline > 1, f"parallel.pipeline = {recipe.parallel.pipeline}", "1"),
        (recipe.experts.redundant > 0, f"experts.redundant = {recipe.experts.redundant}", "0"),
        (recipe.experts.balance == "on", "experts.balance = on", "auto or off"),
        (
            recipe.experts.dispatch == "all_to_all" and recipe.cluster.device == "cuda",
            "experts.dispatch = all_to_all with cluster.device = cuda",
            "auto or all_gather",
        ),
        (recipe.overlap == "on", "overlap = on", "auto or off"),
        (recipe.kv_cache.host_memory > 0, f"kv_cache.host_memory = {recipe.kv_cache.host_memory}", "0"),
        (recipe.deterministic, "deterministic = true", "false"),
    )
    return [
        f"{what}: does not work yet in this version; use {allowed}"
        for wrong, what, allowed in checks
        if wrong
    ]


def model_directory(recipe: Recipe, folder: Path) -> Path:
    """The checkpoint's directory. ``folder`` is the recipe file's."""
    return (folder / Path(recipe.model.path).expanduser()).resolve()


def key_type(path: tuple[str, ...]) -> Any:
    """The annotation of a key, or None where there is no such key or it is a section."""
    part: type[BaseModel] = Recipe
    for name in path[:-1]:
        field = part.model_fields.get(name)
        if field is None or not (
            isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        ):
            return None
        part = field.annotation
    field = part.model_fields.get(path[-1])
    return None if field is None else field.annotation


def key_paths(part: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """Every key of the recipe as a dotted path, sections included."""
    paths = []
    for name, field in part.model_fields.items():
        paths.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            paths += key_paths(field.annotation, f"{prefix}{name}.")
    return paths
