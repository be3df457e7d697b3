"""The specification of every process, from the recipe and the model's config."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
from msgspec import structs

from ...engine.models.config import ModelConfig
from ...engine.protocol.buckets import bucket_over
from ...engine.protocol.cluster_state import ClusterState
from ...engine.protocol.specs import (
    AcceptorSpec,
    ControllerSpec,
    FrontendLimits,
    FrontendSpec,
    LobbySpec,
    RankSpec,
    Succession,
)
from ...kernels.formats.kv_format import KvFormat
from ..cluster.cluster import Imports, Task
from ..environment import nccl_settings, process_settings, tracing_settings
from ..recipe.recipe import Recipe
from ..recipe.resolve import (
    balances,
    dispatch_of,
    dtype_of,
    keeps_fp8,
    kv_events_spec,
    kv_format_of,
    scheduler_spec,
    wire_of,
)
from .keyring import Keyring


@dataclass(frozen=True)
class Site:
    """Properties of this run beyond the recipe. ``device``: cpu or cuda. ``host``: the launcher's
    address. ``placement_i32``: as in ``RankSpec``.
    """

    recipe: Recipe
    config: ModelConfig
    model_path: Path
    host: str
    device: str
    lobby_address: str
    keyring: Keyring
    acceptor: AcceptorSpec
    placement_i32: bytes = b""

    @property
    def dtype(self) -> str:
        return dtype_of(self.recipe, self.config.dtype)

    @property
    def kv_format(self) -> KvFormat:
        return kv_format_of(self.recipe, self.dtype, self.device)

    @property
    def keep_fp8(self) -> bool:
        return keeps_fp8(self.recipe, self.config.kernel_fp8, self.device)

    @property
    def fp8_experts(self) -> bool:
        return self.keep_fp8 and self.config.four_bit is None

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
        return process_settings(
            threads=threads, loopback=self.host.startswith("127."), isa=self.recipe.cluster.isa
        )


def controller_task(site: Site) -> Task:
    recipe = site.recipe
    public, secret = site.keyring.controller
    spec = ControllerSpec(
        host=site.host,
        public=public,
        secret=secret,
        allowed=site.keyring.allowed,
        mesh=recipe.mesh,
        scheduler=scheduler_spec(recipe),
        model_max_len=site.config.max_position,
        max_len=recipe.model.max_len,
        rank_deadline=recipe.cluster.start_deadline,
        collective_deadline=recipe.cluster.collective_deadline,
        recording=None if recipe.recording is None else str(Path(recipe.recording).expanduser().absolute()),
        lobby=site.lobby("controller 0"),
        placement_i32=site.placement_i32,
        balance=balances(recipe),
        survivors=recipe.cluster.survivors == "go_on",
        kv_events=kv_events_spec(recipe),
    )
    return Task("controller", 0, msgspec.json.encode(spec), environment=site.settings(threads=1))


def successor_task(task: Task, addresses: tuple[str, ...], state: ClusterState | None) -> Task:
    """The controller that follows the one of ``task`` at the same ``addresses``. ``state`` is the
    last one that the launcher received.
    """
    spec = msgspec.json.decode(task.spec, type=ControllerSpec)
    before = spec.succession or Succession(life=0, addresses=addresses, epoch=0, max_len=0, page_size=0)
    succession = structs.replace(before, life=before.life + 1)
    if state is not None and state.max_len > 0:
        succession = structs.replace(
            succession,
            epoch=state.epoch,
            max_len=state.max_len,
            page_size=state.page_size if state.prefix_caching else 0,
            draining=state.phase in ("draining", "drained"),
            lost=_gone_on_without(state),
        )
    recording = None if spec.recording is None else _further(spec.recording)
    changed = structs.replace(spec, succession=succession, recording=recording)
    return replace(task, spec=msgspec.json.encode(changed))


def _gone_on_without(state: ClusterState) -> tuple[int, ...]:
    """The lost ranks without which the others served."""
    serving = state.phase in ("serving", "draining")
    return tuple(rank.rank for rank in state.ranks if serving and rank.state == "lost")


def _further(recording: str) -> str:
    """The first name after ``recording`` that no file has: NAME, NAME.2, NAME.3, ..."""
    stem, dot, number = recording.rpartition(".")
    name, count = (stem, int(number)) if dot and number.isdecimal() else (recording, 1)
    while os.path.lexists(f"{name}.{count + 1}"):
        count += 1
    return f"{name}.{count + 1}"


def imports_of_ranks(site: Site) -> Imports:
    settings = site.settings(site.threads)
    if site.device != "cuda":
        return Imports("lockstep.engine.rank.imports_on_cpu", settings)
    settings |= nccl_settings(site.recipe.cluster.collective_deadline)
    return Imports("lockstep.engine.rank.process", settings)


def rank_task(site: Site, rank: int, step_address: str, bulk_address: str, store_address: str) -> Task:
    recipe = site.recipe
    spec = RankSpec(
        rank=rank,
        mesh=recipe.mesh,
        keys=site.keyring.to_controller(f"rank {rank}"),
        step_address=step_address,
        bulk_address=bulk_address,
        store_address=store_address,
        store_keys=site.keyring.to_store(f"rank {rank}"),
        model_path=str(site.model_path),
        dtype=site.dtype,
        keep_fp8=site.keep_fp8,
        kv_dtype=site.kv_format,
        page_size=recipe.kv_cache.page_size,
        kv_memory=recipe.kv_cache.memory,
        ranks_per_host=recipe.cluster.ranks_per_node,
        max_running=recipe.scheduler.max_running,
        max_len=recipe.model.max_len,
        dispatch=site.dispatch,
        weights=recipe.model.weights,
        wire=wire_of(recipe, site.fp8_experts),
        device=_device_of(site, rank),
        threads=site.threads,
        capacity=bucket_over(recipe.scheduler.max_batch_tokens),
        libraries=recipe.kernels.libraries,
        overlap=recipe.overlap != "off",
        balance=balances(recipe),
        collective_deadline=recipe.cluster.collective_deadline,
        pause_deadline=recipe.cluster.pause_deadline,
        lobby=site.lobby(f"rank {rank}"),
        placement_i32=site.placement_i32,
    )
    imports = imports_of_ranks(site)
    return Task(
        "rank",
        rank,
        msgspec.json.encode(spec),
        node=rank // recipe.cluster.ranks_per_node,
        num_gpus=int(site.device == "cuda"),
        environment=imports.environment,
        imports=imports,
    )


def _device_of(site: Site, rank: int) -> str:
    """A rank sees all GPUs of its node and takes its own by number: torch's symmetric memory tells
    the ranks of a node apart by that.
    """
    if site.device != "cuda":
        return site.device
    return f"cuda:{rank % site.recipe.cluster.ranks_per_node}"


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
        cors_origins=recipe.frontend.cors_origins,
        access_log=recipe.frontend.access_log == "on",
        access_log_file=_absolute(recipe.frontend.access_log_file),
        tracing={"off": None, "on": ""}.get(recipe.frontend.tracing, recipe.frontend.tracing),
        pause_deadline=recipe.cluster.pause_deadline,
        grammar_seconds=recipe.frontend.grammar_seconds,
        grammar_memory=recipe.frontend.grammar_memory,
        limits=FrontendLimits(
            max_connections=recipe.frontend.max_connections,
            max_body=recipe.frontend.max_body,
            body_memory=recipe.frontend.body_memory,
            head_deadline=recipe.frontend.head_deadline,
            body_deadline=recipe.frontend.body_deadline,
            idle_deadline=recipe.frontend.idle_deadline,
            read_deadline=recipe.frontend.read_deadline,
        ),
        lobby=site.lobby(f"frontend {index}"),
    )
    settings = site.settings(threads=1)
    if spec.tracing is not None:
        settings |= tracing_settings()
    return Task("frontend", index, msgspec.json.encode(spec), environment=settings)


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().absolute())
