"""Resolves ``auto`` in a recipe by its model and device, and checks recipe against model."""

from __future__ import annotations

from typing import Literal, Protocol

from ...engine.models.config import GqaConfig, MlaConfig, kv_shapes
from ...engine.protocol.buckets import BUCKETS
from ...engine.protocol.specs import KVEventsSpec, SchedulerSpec
from ...kernels.formats.kv_format import KvFormat, parse_format
from ...moe.config import MoEConfig
from ...parallel import deepep_sizes, nccl_ep_sizes
from ...parallel.deepep_sizes import MOST_TOKENS, rounded_capacity
from .libraries import without_library
from .recipe import Recipe
from .sections import LIBRARY_EXCHANGES

_DTYPES = {"bfloat16": "bf16", "float32": "fp32"}

_LINKED_TOP_K, _MOST_LINKED = (1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 18, 22), 256
"""Choices of a token and ranks for which FlashInfer 0.7.4 has an exchange over NVLink."""

PROMPT_SHARE = 1 / 3
"""Share of the time that prompts get if decoding alone exceeds ``scheduler.inter_token_target``: a
prompt then takes a few times as long as alone, and tokens take half as long again.
"""


class ModelFacts(Protocol):
    """Properties of a model that a recipe must fit."""

    @property
    def dtype(self) -> str: ...
    @property
    def max_position(self) -> int: ...
    @property
    def moe(self) -> MoEConfig: ...
    @property
    def attention(self) -> GqaConfig | MlaConfig: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def moe_layers(self) -> tuple[int, ...]: ...
    @property
    def dense_width(self) -> int: ...
    @property
    def kernel_fp8(self) -> bool: ...
    @property
    def four_bit(self) -> object: ...


def check_model(recipe: Recipe, config: ModelFacts) -> list[str]:
    """Contradictions between recipe and model; each line names both values."""
    found = []
    max_len = recipe.model.max_len
    if max_len is not None and max_len > config.max_position:
        found.append(f"model.max_len = {max_len}: above the {config.max_position} positions of the model")
    if recipe.model.dtype == "auto" and config.dtype not in _DTYPES:
        found.append(f"model.dtype = auto: no computing in the checkpoint's {config.dtype}; use bf16 or fp32")
    if recipe.kv_cache.dtype == "fp8" or (recipe.kv_cache.dtype == "auto" and recipe.cluster.device != "cpu"):
        try:
            kv_shapes(config.attention, "fp8")
        except ValueError as error:
            found.append(str(error))
    if recipe.mesh.experts > config.moe.num_experts:
        found.append(
            f"cluster.nodes x cluster.ranks_per_node = {recipe.world}: more ranks than the "
            f"{config.moe.num_experts} experts of the model"
        )
    most = config.moe.num_experts * (recipe.mesh.experts - 1)
    if recipe.experts.redundant > most:
        found.append(
            f"experts.redundant = {recipe.experts.redundant}: above {most}, which is a replica of each of "
            f"{config.moe.num_experts} experts on each of {recipe.mesh.experts - 1} other ranks of a stage"
        )
    if recipe.cluster.device == "cpu":
        found += for_gpus(recipe)
    elif recipe.experts.wire == "fp8" and not _fp8_experts(recipe, config):
        found.append(
            "experts.wire = fp8: the experts of this model are not computed in FP8 here; use auto or full"
        )
    dtype = dtype_of(recipe, config.dtype) if config.dtype in _DTYPES else "bf16"
    found += without_library(recipe, config.attention, kv_format_of(recipe, "bf16", "cuda"), dtype)
    found += _unlinked(recipe, config)
    found += _beyond_deepep(recipe, config) + _beyond_nccl_ep(recipe, config)
    return found + _unsplittable(recipe, config)


def _followers(config: ModelFacts) -> int:
    """The layers that use the positions chosen by the indexer of an earlier layer."""
    attention = config.attention
    indexer = attention.indexer if isinstance(attention, MlaConfig) else None
    return 0 if indexer is None else len(indexer.followers)


def _fp8_experts(recipe: Recipe, config: ModelFacts) -> bool:
    """Whether experts may be FP8; a device that is not known yet may be a GPU."""
    return keeps_fp8(recipe, config.kernel_fp8, "cuda") and config.four_bit is None


def _unlinked(recipe: Recipe, config: ModelFacts) -> list[str]:
    """Sizes that ``experts.dispatch`` = flashinfer has no kernels for."""
    if recipe.experts.dispatch != "flashinfer":
        return []
    key, found = "experts.dispatch = flashinfer", []
    if config.moe.top_k not in _LINKED_TOP_K:
        allowed = ", ".join(map(str, _LINKED_TOP_K))
        found.append(f"{key}: {config.moe.top_k} experts of a token: allowed are {allowed}; use all_to_all")
    if recipe.mesh.experts > _MOST_LINKED:
        found.append(f"{key}: {recipe.mesh.experts} ranks: allowed are {_MOST_LINKED}; use all_to_all")
    return found


def _beyond_deepep(recipe: Recipe, config: ModelFacts) -> list[str]:
    """Sizes that ``experts.dispatch`` = deepep has no kernels for."""
    if recipe.experts.dispatch != "deepep":
        return []
    key, ranks, tensor, found = "experts.dispatch = deepep", recipe.mesh.experts, recipe.parallel.tensor, []
    if config.moe.hidden not in deepep_sizes.HIDDEN_SIZES:
        allowed = ", ".join(map(str, deepep_sizes.HIDDEN_SIZES))
        found.append(f"{key}: a hidden size of {config.moe.hidden}: allowed are {allowed}; use all_to_all")
    found += _too_many_choices(key, config, deepep_sizes.MOST_CHOICES)
    if ranks >= (eight := deepep_sizes.NODE_RANKS) and ranks % eight:
        found.append(
            f"{key}: {ranks} ranks: allowed are fewer than {eight}, or multiples of it; use all_to_all"
        )
    found += _beyond_bf16(key, recipe, config)
    most, batch = _most_by_deepep(ranks, tensor), recipe.scheduler.max_batch_tokens
    if batch > most:
        found.append(
            f"{key}: scheduler.max_batch_tokens = {batch}: a rank may have {MOST_TOKENS} tokens in a step; "
            f"use at most {most}, or all_to_all"
        )
    return found


def _most_by_deepep(ranks: int, tensor: int) -> int:
    """The largest bucket of which a rank gets no more tokens than its queues hold."""
    return max(size for size in BUCKETS if rounded_capacity(-(-size // tensor), ranks) <= MOST_TOKENS)


def _beyond_nccl_ep(recipe: Recipe, config: ModelFacts) -> list[str]:
    """Sizes that ``experts.dispatch`` = nccl_ep has no kernels for."""
    if recipe.experts.dispatch != "nccl_ep":
        return []
    key, step, found = "experts.dispatch = nccl_ep", nccl_ep_sizes.HIDDEN_STEP, []
    if config.moe.hidden % step:
        found.append(
            f"{key}: a hidden size of {config.moe.hidden}: allowed are multiples of {step}; use all_to_all"
        )
    found += _too_many_choices(key, config, nccl_ep_sizes.MOST_CHOICES)
    if recipe.mesh.experts > (most := nccl_ep_sizes.MOST_RANKS):
        found.append(f"{key}: {recipe.mesh.experts} ranks: allowed are {most}; use all_to_all")
    return found + _beyond_bf16(key, recipe, config)


def _too_many_choices(key: str, config: ModelFacts, most: int) -> list[str]:
    if config.moe.top_k <= most:
        return []
    return [f"{key}: {config.moe.top_k} experts of a token: allowed are {most}; use all_to_all"]


def _beyond_bf16(key: str, recipe: Recipe, config: ModelFacts) -> list[str]:
    if config.dtype not in _DTYPES or dtype_of(recipe, config.dtype) == "bf16":
        return []
    return [f"{key}: model.dtype = {recipe.model.dtype}: it carries bf16; use bf16, or all_to_all"]


def _unsplittable(recipe: Recipe, config: ModelFacts) -> list[str]:
    """Layers that do not suffice for ``parallel.pipeline``, or that ``parallel.tensor`` or
    ``parallel.dense`` does not divide.
    """
    tensor, pipeline, found = recipe.parallel.tensor, recipe.parallel.pipeline, []
    stays = _followers(config)
    if pipeline > config.num_layers - stays:
        layers = f"{config.num_layers} layers" + (f", of which {stays} stay with one before" if stays else "")
        found.append(f"parallel.pipeline = {pipeline}: more stages than the {layers}")
    try:
        config.attention.split(tensor)
    except ValueError as error:
        found.append(f"parallel.tensor = {tensor}: {error}")
    has_dense, dense = len(config.moe_layers) < config.num_layers, recipe.parallel.dense
    if dense is None and has_dense and config.dense_width % tensor:
        found.append(
            f"parallel.tensor = {tensor}: does not divide the width {config.dense_width} of dense layers"
        )
    if dense is not None and has_dense and config.dense_width % dense:
        found.append(
            f"parallel.dense = {dense}: does not divide the width {config.dense_width} of dense layers"
        )
    if dense is not None and config.moe.shared_width % dense:
        found.append(
            f"parallel.dense = {dense}: does not divide the width {config.moe.shared_width} of shared experts"
        )
    return found


def dtype_of(recipe: Recipe, checkpoint: str) -> str:
    """The dtype of activations; ``checkpoint`` is the dtype of the checkpoint."""
    return _DTYPES[checkpoint] if recipe.model.dtype == "auto" else recipe.model.dtype


def keeps_fp8(recipe: Recipe, kernel_fp8: bool, device: str) -> bool:
    """Whether experts and linear layers stay in the checkpoint's FP8: only on GPUs, which have
    kernels for it, and unless ``model.dtype`` asks for another dtype.
    """
    return kernel_fp8 and device == "cuda" and recipe.model.dtype == "auto"


def wire_of(recipe: Recipe, fp8_experts: bool) -> Literal["full", "fp8"]:
    """How hidden states travel to experts, which quantise them anyway where they are FP8."""
    if recipe.experts.wire == "auto":
        return "fp8" if fp8_experts else "full"
    return recipe.experts.wire


def for_gpus(recipe: Recipe) -> list[str]:
    """A line for each setting that only ranks on GPUs can follow."""
    found = {
        **{f"kernels.{op} = {name}": (True, "auto and own") for op, name in recipe.kernels.libraries.items()},
        "experts.wire = fp8": (recipe.experts.wire == "fp8", "auto and full"),
        **{
            f"experts.dispatch = {library}": (
                recipe.experts.dispatch == library,
                "auto, all_gather and all_to_all",
            )
            for library in LIBRARY_EXCHANGES
        },
    }
    return [
        f"{key}: is for ranks on GPUs, and these are on CPUs; allowed are {allowed}"
        for key, (is_set, allowed) in found.items()
        if is_set
    ]


def kv_format_of(recipe: Recipe, dtype: str, device: str) -> KvFormat:
    """The format of KV pages; ``dtype`` is the dtype of activations."""
    wanted = recipe.kv_cache.dtype
    if wanted != "auto":
        return wanted
    return "fp8" if device == "cuda" else parse_format(dtype)


def dispatch_of(recipe: Recipe, device: str) -> str:
    """The dispatcher. all_to_all sends the least. On GPUs it needs NVSHMEM and a new process after
    the loss of a peer, so within a node, where links are fast, all_gather serves.
    """
    if recipe.experts.dispatch != "auto":
        return recipe.experts.dispatch
    if recipe.world == 1:
        return "local"
    return "all_to_all" if device == "cpu" or recipe.cluster.nodes > 1 else "all_gather"


def balances(recipe: Recipe) -> bool:
    """Whether experts move by load: if several ranks share them, unless that is off."""
    return recipe.experts.balance != "off" and recipe.mesh.experts > 1


def kv_events_spec(recipe: Recipe) -> KVEventsSpec | None:
    """Addresses that publish KV cache events; None if disabled."""
    kv = recipe.kv_cache
    if kv.events == "off":
        return None
    replay = "" if kv.events_replay == "off" else kv.events_replay
    return KVEventsSpec(address=kv.events, replay_address=replay, topic=kv.events_topic)


def scheduler_spec(recipe: Recipe) -> SchedulerSpec:
    """The bounds of the planner."""
    return SchedulerSpec(
        max_batch_tokens=recipe.scheduler.max_batch_tokens,
        max_running=recipe.scheduler.max_running,
        max_queue=recipe.scheduler.max_queue,
        inter_token_target=recipe.scheduler.inter_token_target,
        prefix_caching=recipe.kv_cache.prefix_caching,
        checksum_every=recipe.scheduler.checksum_every,
        prompt_share=PROMPT_SHARE,
        step_time_limit=recipe.scheduler.step_time_limit,
        overlap=recipe.overlap,
    )
