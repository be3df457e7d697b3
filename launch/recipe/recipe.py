"""The recipe: every setting of a cluster, checked before anything starts.

A recipe is a YAML file of sections and keys; ``key=value`` on the command line overrides one key.
Every key is described here and nowhere else. RecipeError reports all problems at once, each with
the path of its key.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from ...parallel.mesh import Mesh
from .sections import LIBRARY_EXCHANGES, ExpertsSection, KernelsSection, RecipeSection
from .values import AutoInt, AutoSize, Size, Strings, collector, endpoint, origins, short_dtype, switch


class RecipeError(ValueError):
    """A recipe that cannot be run; the message lists every problem."""


class ModelSection(RecipeSection):
    path: str = Field(
        min_length=1, description="Hugging Face checkpoint directory, relative to the recipe file"
    )
    config: str | None = Field(
        default=None,
        min_length=1,
        description="folder with a config.json (or params.json) for launch plan, while path does not exist",
    )
    weights: Literal["checkpoint", "random"] = Field(
        default="checkpoint",
        description="random: values made in the shape that path or config describes, to measure with",
    )
    served_name: str | None = Field(
        default=None, min_length=1, description="model name in the API; default: the directory's name"
    )
    dtype: Annotated[Literal["auto", "bf16", "fp32"], BeforeValidator(short_dtype)] = Field(
        default="auto",
        description="dtype of weights and activations: bfloat16 or float32 (bf16, fp32); "
        "auto: the checkpoint's; routed experts in 4 bits stay so",
    )
    max_len: AutoInt = Field(
        default=None, ge=2, description="most tokens of prompt and output; auto: what model and memory allow"
    )


class ClusterSection(RecipeSection):
    backend: Literal["ray", "local"] = Field(
        default="ray", description="ray, or local: processes on this machine without Ray"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="device of the ranks; auto: cuda where this machine has GPUs"
    )
    hardware: str | None = Field(default=None, min_length=1, description="hardware profile for launch plan")
    nodes: int = Field(default=1, ge=1, le=4096, description="number of machines")
    ranks_per_node: int = Field(
        default=1, ge=1, le=64, description="ranks per machine, each with one GPU or a share of the cores"
    )
    threads: AutoInt = Field(
        default=None, ge=1, description="CPU threads per rank; auto: the node's cores divided by its ranks"
    )
    isa: Literal["auto", "avx512_bf16", "avx512", "avx2"] = Field(
        default="auto", description="highest instruction set that ranks on x86 CPUs use"
    )
    address: str | None = Field(
        default=None, description="Ray cluster to join; default: a new one on this machine"
    )
    log_dir: str | None = Field(
        default=None, description="folder for logs; default: the system's temporary folder"
    )
    start_deadline: float = Field(
        default=600.0, gt=0, description="seconds in which every rank must have loaded its weights"
    )
    drain_deadline: float = Field(
        default=30.0, ge=0, description="seconds for running requests to finish after SIGTERM or Ctrl-C"
    )
    collective_deadline: float = Field(
        default=60.0, gt=0, description="seconds after which a rank gives up on a collective"
    )
    survivors: Literal["go_on", "wait"] = Field(
        default="go_on",
        description="after the loss of a rank: go_on without it once the others hold every expert (in slots "
        "of experts.redundant), or wait for its replacement",
    )
    pause_deadline: float = Field(
        default=120.0,
        gt=0,
        description="seconds that requests wait for an unresponsive controller before the run ends",
    )


class ParallelSection(RecipeSection):
    tensor: int = Field(default=1, ge=1, description="tensor parallel size of attention and dense layers")
    pipeline: int = Field(
        default=1, ge=1, description="number of pipeline stages; layers go to stages by cost"
    )
    dense: AutoInt = Field(
        default=None,
        ge=1,
        description="ranks that split dense layers and shared experts, a multiple of tensor; auto: tensor "
        "splits dense layers, and shared experts are whole on every rank",
    )


class KvCacheSection(RecipeSection):
    dtype: Annotated[Literal["auto", "bf16", "fp32", "fp8"], BeforeValidator(short_dtype)] = Field(
        default="auto",
        description="dtype of KV pages: bfloat16, float32 or fp8; auto: fp8 on GPUs, "
        "else the activations' dtype",
    )
    page_size: int = Field(default=64, ge=1, le=1024, description="tokens per page, a power of two")
    memory: AutoSize = Field(
        default=None,
        ge=1,
        le=2**50,
        description="bytes of KV pages per rank (512MiB, 60GB); auto: the free memory",
    )
    prefix_caching: bool = Field(default=True, description="reuse pages of equal prompt prefixes")
    host_memory: Size = Field(
        default=0, ge=0, le=2**50, description="bytes of host memory per rank for evicted pages"
    )
    events: Annotated[str, BeforeValidator(switch), AfterValidator(endpoint)] = Field(
        default="off",
        description="publish cached blocks to routers such as llm-d and Dynamo, in vLLM's wire format: "
        "an address to listen on such as tcp://10.0.0.5:5557 or tcp://*:5557; open to all who reach it",
    )
    events_replay: Annotated[str, BeforeValidator(switch), AfterValidator(endpoint)] = Field(
        default="off",
        description="address at which routers ask for missed events, such as tcp://10.0.0.5:5558",
    )
    events_topic: str = Field(
        default="", max_length=256, description="topic of the events; llm-d reads kv@POD@MODEL"
    )


class SchedulerSection(RecipeSection):
    max_batch_tokens: int = Field(default=8192, ge=1, description="most tokens a rank computes in a step")
    max_running: int = Field(
        default=128, ge=1, le=4096, description="most running requests per data-parallel rank"
    )
    max_queue: int = Field(
        default=1024, ge=1, description="most waiting requests; further ones are answered 503"
    )
    inter_token_target: float = Field(
        default=0.2, gt=0, description="longest step in seconds that prefill may cause while others decode"
    )
    step_time_limit: float = Field(
        default=5.0, gt=0, description="longest step in seconds that prefill may cause on an idle rank"
    )
    checksum_every: int = Field(
        default=64, ge=1, description="steps between checksum comparisons of ranks and planner"
    )


class FrontendSection(RecipeSection):
    host: str = Field(
        default="127.0.0.1", min_length=1, description="address to listen on; 0.0.0.0: all interfaces"
    )
    port: int = Field(default=8000, ge=0, le=65535, description="port to listen on; 0: a free one")
    processes: int = Field(default=1, ge=1, le=64, description="frontend processes behind the port")
    api_keys: Strings = Field(default=(), description="accepted bearer keys; empty: no key needed")
    admin_key: str | None = Field(
        default=None, min_length=1, description="bearer key of /admin; default: /admin is closed"
    )
    cors_origins: Annotated[Strings, AfterValidator(origins)] = Field(
        default=("localhost",),
        description="pages that may use the server from a browser: origins such as https://chat.example.com; "
        'localhost: those of this machine, any port; ["*"]: all; []: none',
    )
    access_log: Annotated[Literal["off", "on"], BeforeValidator(switch)] = Field(
        default="on", description="a line in the frontend's log for each request: id, status, tokens, times"
    )
    access_log_file: str | None = Field(
        default=None,
        min_length=1,
        description="file to append a JSON line to for each request; default: none",
    )
    tracing: Annotated[str, BeforeValidator(switch), AfterValidator(collector)] = Field(
        default="off",
        description="spans over OTLP/HTTP: a collector's URL such as http://collector:4318; on: that of "
        "OTEL_EXPORTER_OTLP_ENDPOINT; needs the extra otel",
    )
    tool_parser: Annotated[
        Literal[
            "auto",
            "off",
            "deepseek_v3",
            "deepseek_v31",
            "deepseek_v32",
            "glm4",
            "glm47",
            "harmony",
            "hermes",
            "hy_v3",
            "hy_v3_preview",
            "kimi_k2",
            "minimax_m2",
            "mistral",
            "qwen3_coder",
        ],
        BeforeValidator(switch),
    ] = Field(default="auto", description="format of tool calls; auto: by the chat template")
    reasoning_parser: Annotated[
        Literal["auto", "off", "think", "mistral", "harmony", "hy_v3"], BeforeValidator(switch)
    ] = Field(default="auto", description="format of reasoning; auto: by the chat template")
    grammar_seconds: float = Field(
        default=1.5, gt=0, le=60, description="most CPU seconds to check one schema or pattern of a request"
    )
    grammar_memory: Size = Field(
        default=256 << 20, ge=16 << 20, le=2**40, description="most bytes of memory to check one of them"
    )
    max_connections: int = Field(
        default=4096, ge=1, le=2**20, description="most connections that a frontend serves at once"
    )
    max_body: Size = Field(default=8 << 20, ge=65536, le=2**30, description="most bytes of a request body")
    body_memory: Size = Field(
        default=256 << 20, ge=8 << 20, le=2**40, description="bytes of bodies that a frontend holds at once"
    )
    head_deadline: float = Field(
        default=20.0, gt=0, description="seconds in which the head of a request must be complete"
    )
    body_deadline: float = Field(
        default=120.0, gt=0, description="seconds in which the body of a request must be complete"
    )
    idle_deadline: float = Field(
        default=75.0, gt=0, description="seconds after which a connection without a request is closed"
    )
    read_deadline: float = Field(
        default=60.0,
        gt=0,
        description="seconds after which a client that reads none of its answer is cut off",
    )


class Recipe(RecipeSection):
    """The whole recipe."""

    model: ModelSection
    cluster: ClusterSection = ClusterSection()
    parallel: ParallelSection = ParallelSection()
    experts: ExpertsSection = ExpertsSection()
    overlap: Annotated[Literal["auto", "off", "on"], BeforeValidator(switch)] = Field(
        default="auto",
        description="compute one microbatch while another exchanges tokens; auto: where measured to pay",
    )
    kernels: KernelsSection = KernelsSection()
    kv_cache: KvCacheSection = KvCacheSection()
    scheduler: SchedulerSection = SchedulerSection()
    frontend: FrontendSection = FrontendSection()
    deterministic: bool = Field(default=False, description="logits independent of batch and layout")
    recording: str | None = Field(
        default=None,
        min_length=1,
        description="file to record every event and plan to; a controller that replaces another adds .2",
    )
    verified: str | None = Field(
        default=None, min_length=1, description="hardware the recipe has run on; for readers only"
    )

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.cluster.nodes * self.cluster.ranks_per_node

    @property
    def data(self) -> int:
        """Data-parallel size: world / (tensor x pipeline)."""
        return self.world // (self.parallel.tensor * self.parallel.pipeline)

    @property
    def mesh(self) -> Mesh:
        parallel = self.parallel
        return Mesh(
            pipeline=parallel.pipeline, data=self.data, tensor=parallel.tensor, dense=parallel.dense or 0
        )


def problems(recipe: Recipe) -> list[str]:
    """Problems of a well-formed recipe: contradictions between keys, then unsupported values."""
    return contradictions(recipe) + not_yet(recipe)


def contradictions(recipe: Recipe) -> list[str]:
    """Keys that contradict each other in any version."""
    cluster, scheduler, kv = recipe.cluster, recipe.scheduler, recipe.kv_cache
    share = recipe.parallel.tensor * recipe.parallel.pipeline
    max_len, keys = recipe.model.max_len, recipe.frontend
    body, held = keys.max_body, keys.body_memory
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
            f"scheduler.max_batch_tokens = {scheduler.max_batch_tokens}: below scheduler.max_running "
            f"({scheduler.max_running}); every running request takes one token per step",
        ),
        (kv.page_size.bit_count() != 1, f"kv_cache.page_size = {kv.page_size}: should be a power of two"),
        (
            kv.events != "off" and not kv.prefix_caching,
            f"kv_cache.events = {kv.events}: without kv_cache.prefix_caching no block is cached",
        ),
        (
            kv.events_replay != "off" and kv.events in ("off", kv.events_replay),
            f"kv_cache.events_replay = {kv.events_replay}: needs kv_cache.events at another address",
        ),
        (
            max_len is not None and kv.memory is not None and kv.memory < max_len,
            f"kv_cache.memory = {kv.memory}: less than one byte per token of model.max_len ({max_len})",
        ),
        (
            recipe.experts.dispatch == "local" and recipe.world > 1,
            f"experts.dispatch = local: keeps all experts on one rank, but there are {recipe.world} "
            f"(cluster.nodes {cluster.nodes} x cluster.ranks_per_node {cluster.ranks_per_node}); "
            "use auto, all_gather or all_to_all",
        ),
        (
            keys.admin_key is not None and keys.admin_key in keys.api_keys,
            "frontend.admin_key: is also in frontend.api_keys; every user would be an administrator",
        ),
        (body > held, f"frontend.max_body = {body}: above frontend.body_memory ({held})"),
    )
    return [text for wrong, text in (*checks, *_single_ranks(recipe), *_dense_groups(recipe)) if wrong]


def _single_ranks(recipe: Recipe) -> tuple[tuple[bool, str], ...]:
    """Settings of the exchange, which a stage of one rank does not have."""
    single = recipe.world == recipe.parallel.pipeline
    nothing = "a stage has one rank, which exchanges no tokens"
    return (
        (
            single and recipe.experts.dispatch in LIBRARY_EXCHANGES,
            f"experts.dispatch = {recipe.experts.dispatch}: {nothing}; use auto",
        ),
        (
            single and recipe.experts.balance == "on",
            "experts.balance = on: a stage has one rank, which has all experts; use auto or off",
        ),
        (single and recipe.overlap == "on", f"overlap = on: {nothing}; use auto or off"),
    )


def _dense_groups(recipe: Recipe) -> tuple[tuple[bool, str], ...]:
    """Contradictions of ``parallel.dense``, where it is set."""
    dense, tensor = recipe.parallel.dense, recipe.parallel.tensor
    if dense is None:
        return ()
    stage, what = recipe.data * tensor, f"parallel.dense = {dense}"
    return (
        (dense % tensor != 0, f"{what}: not a multiple of parallel.tensor ({tensor})"),
        (stage % dense != 0, f"{what}: does not divide the {stage} ranks of a pipeline stage"),
    )


def not_yet(recipe: Recipe) -> list[str]:
    """Valid values that this version does not support: launching refuses them.

    ``launch plan`` plans with them and reports them.
    """
    checks = (
        (recipe.kv_cache.host_memory > 0, f"kv_cache.host_memory = {recipe.kv_cache.host_memory}", "0"),
        (recipe.deterministic, "deterministic = true", "false"),
    )
    return [
        f"{what}: does not work yet in this version; use {allowed}"
        for wrong, what, allowed in checks
        if wrong
    ]
