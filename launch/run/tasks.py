"""From a recipe and a model's description to what every process is told."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from ...engine.models.config import GqaConfig, MlaConfig, ModelConfig, kv_shapes
from ...engine.protocol.sockets import new_keypair
from ...engine.protocol.specs import (
    AcceptorSpec,
    ControllerSpec,
    FrontendSpec,
    Keys,
    Layout,
    LobbySpec,
    RankSpec,
    SchedulerSpec,
)
from ...kernels.formats.kv_format import KvFormat, parse_format
from ...moe.config import MoEConfig
from ..cluster.cluster import Task
from ..environment import process_settings
from ..recipe.recipe import Recipe

_DTYPES = {"bfloat16": "bf16", "float32": "fp32"}


class Keyring:
    """The CURVE keys of one run: a pair each for the controller's and the lobby's sockets, and one per client process."""

    def __init__(self, names: list[str]) -> None:
        self._controller = new_keypair()
        self._lobby = new_keypair()
        self._clients = {name: new_keypair() for name in names}

    @property
    def controller(self) -> tuple[str, str]:
        """(public, secret) of the controller's server sockets."""
        return self._controller

    @property
    def lobby(self) -> tuple[str, str]:
        """(public, secret) of the lobby's server socket."""
        return self._lobby

    @property
    def allowed(self) -> tuple[str, ...]:
        """Public keys of all clients."""
        return tuple(public for public, _ in self._clients.values())

    def to_controller(self, name: str) -> Keys:
        return self._keys(self._controller[0], name)

    def to_lobby(self, name: str) -> Keys:
        return self._keys(self._lobby[0], name)

    def _keys(self, server_public: str, name: str) -> Keys:
        public, secret = self._clients[name]
        return Keys(server_public=server_public, public=public, secret=secret)


class ModelFacts(Protocol):
    """What of a model is compared with a recipe."""

    @property
    def dtype(self) -> str: ...
    @property
    def max_position(self) -> int: ...
    @property
    def moe(self) -> MoEConfig: ...
    @property
    def attention(self) -> GqaConfig | MlaConfig: ...


def check_model(recipe: Recipe, config: ModelFacts) -> list[str]:
    """What does not fit between the recipe and the model; each line holds both values."""
    found = []
    max_len = recipe.model.max_len
    if max_len is not None and max_len > config.max_position:
        found.append(f"model.max_len = {max_len}: above the {config.max_position} positions of the model")
    if recipe.model.dtype == "auto" and config.dtype not in _DTYPES:
        found.append(f"model.dtype = auto: the checkpoint holds {config.dtype}, which is not computed in; use bf16 or fp32")
    if recipe.kv_cache.dtype == "fp8" or (recipe.kv_cache.dtype == "auto" and recipe.cluster.device != "cpu"):
        try:
            kv_shapes(config.attention, "fp8")
        except ValueError as error:
            found.append(str(error))
    if recipe.world > config.moe.num_experts:
        num_experts = config.moe.num_experts
        found.append(f"cluster.nodes x cluster.ranks_per_node = {recipe.world}: more ranks than the {num_experts} experts of the model")
    return found


def dtype_of(recipe: Recipe, checkpoint: str) -> str:
    """What the model computes in; ``checkpoint`` is the dtype of its file."""
    return _DTYPES[checkpoint] if recipe.model.dtype == "auto" else recipe.model.dtype


def fp8_experts_of(recipe: Recipe, kernel_fp8: bool, device: str) -> bool:
    """Whether experts stay in the checkpoint's FP8: the kernels for it are those of GPUs. A dtype that is asked for is that of all."""
    return kernel_fp8 and device == "cuda" and recipe.model.dtype == "auto"


def kv_format_of(recipe: Recipe, dtype: str, device: str) -> KvFormat:
    """How pages hold keys and values; ``dtype`` is what the model computes in."""
    wanted = recipe.kv_cache.dtype
    if wanted != "auto":
        return wanted
    return "fp8" if device == "cuda" else parse_format(dtype)


def dispatch_of(recipe: Recipe, device: str) -> str:
    """all_to_all sends only what is needed but reads counts on the host, which a GPU step must not do."""
    if recipe.experts.dispatch != "auto":
        return recipe.experts.dispatch
    if recipe.world == 1:
        return "local"
    return "all_to_all" if device == "cpu" else "all_gather"


@dataclass(frozen=True)
class Site:
    """Facts of this run that the recipe leaves open. ``device`` is cpu or cuda; ``host`` the launcher's address."""

    recipe: Recipe
    config: ModelConfig
    model_path: Path
    host: str
    device: str
    lobby_address: str
    keyring: Keyring
    acceptor: AcceptorSpec

    @property
    def layout(self) -> Layout:
        return Layout(pipeline=self.recipe.parallel.pipeline, data=self.recipe.data, tensor=self.recipe.parallel.tensor)

    @property
    def dtype(self) -> str:
        return dtype_of(self.recipe, self.config.dtype)

    @property
    def kv_format(self) -> KvFormat:
        return kv_format_of(self.recipe, self.dtype, self.device)

    @property
    def dispatch(self) -> str:
        return dispatch_of(self.recipe, self.device)

    @property
    def threads(self) -> int:
        cores = len(os.sched_getaffinity(0))
        return self.recipe.cluster.threads or max(1, cores // self.recipe.cluster.ranks_per_node)

    @property
    def served_name(self) -> str:
        return self.recipe.model.served_name or self.model_path.name

    def lobby(self, name: str) -> LobbySpec:
        return LobbySpec(address=self.lobby_address, keys=self.keyring.to_lobby(name))

    def settings(self, threads: int) -> dict[str, str]:
        return process_settings(threads=threads, loopback=self.host.startswith("127."), isa=self.recipe.cluster.isa)


def process_names(recipe: Recipe) -> list[str]:
    """Every process that needs a key, the launcher included."""
    ranks = [f"rank {rank}" for rank in range(recipe.world)]
    return ["launcher", "controller 0", *[f"frontend {index}" for index in range(recipe.frontend.processes)], *ranks]


def scheduler_spec(recipe: Recipe) -> SchedulerSpec:
    """The bounds of the planner."""
    return SchedulerSpec(
        max_batch_tokens=recipe.scheduler.max_batch_tokens,
        max_running=recipe.scheduler.max_running,
        max_queue=recipe.scheduler.max_queue,
        inter_token_target=recipe.scheduler.inter_token_target,
        prefix_caching=recipe.kv_cache.prefix_caching,
        checksum_every=recipe.scheduler.checksum_every,
    )


def controller_task(site: Site) -> Task:
    recipe = site.recipe
    public, secret = site.keyring.controller
    spec = ControllerSpec(
        host=site.host,
        public=public,
        secret=secret,
        allowed=site.keyring.allowed,
        layout=site.layout,
        scheduler=scheduler_spec(recipe),
        model_max_len=site.config.max_position,
        max_len=recipe.model.max_len,
        rank_deadline=recipe.cluster.start_deadline,
        collective_deadline=recipe.cluster.collective_deadline,
        recording=None if recipe.recording is None else str(Path(recipe.recording).expanduser().absolute()),
        lobby=site.lobby("controller 0"),
    )
    return Task("controller", 0, msgspec.json.encode(spec), environment=site.settings(threads=1))


def rank_task(site: Site, rank: int, step_address: str, bulk_address: str, store: tuple[str, int]) -> Task:
    recipe = site.recipe
    spec = RankSpec(
        rank=rank,
        layout=site.layout,
        keys=site.keyring.to_controller(f"rank {rank}"),
        step_address=step_address,
        bulk_address=bulk_address,
        store_host=store[0],
        store_port=store[1],
        model_path=str(site.model_path),
        dtype=site.dtype,
        fp8_experts=fp8_experts_of(recipe, site.config.kernel_fp8, site.device),
        kv_dtype=site.kv_format,
        page_size=recipe.kv_cache.page_size,
        kv_memory=recipe.kv_cache.memory,
        ranks_per_host=recipe.cluster.ranks_per_node,
        max_running=recipe.scheduler.max_running,
        max_len=recipe.model.max_len,
        dispatch=site.dispatch,
        device="cuda:0" if site.device == "cuda" else site.device,  # a rank sees the one GPU it was given
        threads=site.threads,
        collective_deadline=recipe.cluster.collective_deadline,
        lobby=site.lobby(f"rank {rank}"),
    )
    return Task(
        "rank",
        rank,
        msgspec.json.encode(spec),
        node=rank // recipe.cluster.ranks_per_node,
        num_gpus=int(site.device == "cuda"),
        environment=site.settings(site.threads),
    )


def frontend_task(site: Site, index: int, address: str) -> Task:
    recipe = site.recipe
    spec = FrontendSpec(
        name=f"frontend-{index}",
        index=index,
        keys=site.keyring.to_controller(f"frontend {index}"),
        address=address,
        acceptor=site.acceptor,
        model_path=str(site.model_path),
        served_name=site.served_name,
        vocab_size=site.config.vocab_size,
        kv_format=site.kv_format,
        api_keys=recipe.frontend.api_keys,
        admin_key=recipe.frontend.admin_key,
        tool_parser=recipe.frontend.tool_parser,
        reasoning_parser=recipe.frontend.reasoning_parser,
        lobby=site.lobby(f"frontend {index}"),
    )
    return Task("frontend", index, msgspec.json.encode(spec), environment=site.settings(threads=1))
