"""Settings of ``kernels`` under which the named library would compute no step: a line for each
contradiction, with both values. GPUs are not known here; ranks log what theirs lacks.
"""

from __future__ import annotations

from ...engine.models.config import GqaConfig, MlaConfig
from ...kernels.formats.kv_format import KvFormat
from ...kernels.libraries import sizes
from .recipe import Recipe

Attention = GqaConfig | MlaConfig

_PROMPT_DIMS = sorted({dim for dims in sizes.FLASH_ATTN_4_DIMS.values() for dim in dims})


def without_library(recipe: Recipe, attention: Attention, pages: KvFormat, dtype: str) -> list[str]:
    """The contradictions. ``pages``: the format of KV pages; ``dtype``: that of activations."""
    libraries = recipe.kernels.libraries
    reasons = {
        ("attention", "flashinfer"): _flashinfer,
        ("attention", "flashmla"): _flash_mla,
        ("prompt_attention", "flash_attn_4"): _flash_attn_4,
    }
    found = []
    for op, name in libraries.items():
        if (op, name) not in reasons:
            continue
        key = f"kernels.{op} = {name}"
        found += [f"{key}: {reason}" for reason in reasons[op, name](recipe, attention, pages)]
        if dtype != "bf16":
            found.append(f"{key}: model.dtype = {recipe.model.dtype}: it computes in bf16; use bf16, or own")
    return found


def _flashinfer(recipe: Recipe, attention: Attention, pages: KvFormat) -> list[str]:
    found = _not_bf16(recipe, "attention", pages)
    if isinstance(attention, MlaConfig) and attention.indexer is not None:
        found.append(
            "an indexer chooses the positions of decode rows in this model; use flashmla over pages in "
            "fp8, or own"
        )
    latents = isinstance(attention, MlaConfig)
    return found + _page_size(recipe, sizes.FLASHINFER_LATENT_PAGES if latents else sizes.FLASHINFER_PAGES)


def _flash_mla(recipe: Recipe, attention: Attention, pages: KvFormat) -> list[str]:
    if not isinstance(attention, MlaConfig):
        return ["this model has keys for its heads, and no latents; use flashinfer or own"]
    dims = attention.kv_latent, attention.rope_dim
    if dims != sizes.LATENT:
        latent, rotated = sizes.LATENT
        return [f"latents of {dims[0]} + {dims[1]} dims: allowed are {latent} + {rotated}; use own"]
    if attention.indexer is None:
        return _not_bf16(recipe, "attention", pages) + _page_size(recipe, (sizes.FLASH_MLA_PAGE,))
    found, heads = [], attention.num_heads // recipe.parallel.tensor
    if pages != "fp8":
        found.append(
            f"kv_cache.dtype = {recipe.kv_cache.dtype}: it reads the positions that an indexer chose from "
            "pages in fp8; use kv_cache.dtype = fp8, or kernels.attention = own"
        )
    if heads not in sizes.FLASH_MLA_CHOSEN_HEADS:
        found.append(
            f"parallel.tensor = {recipe.parallel.tensor}: {heads} heads of {attention.num_heads} on a rank: "
            "allowed are 64 and 128; use another, or kernels.attention = own"
        )
    if attention.indexer.top_k % sizes.FLASH_MLA_CHOSEN_BLOCK:
        found.append(f"{attention.indexer.top_k} chosen positions: allowed are multiples of 64; use own")
    return found


def _flash_attn_4(recipe: Recipe, attention: Attention, pages: KvFormat) -> list[str]:
    if isinstance(attention, MlaConfig):
        return ["prompts of this model are attended as latents, by our own kernels; use own"]
    found = _not_bf16(recipe, "prompt_attention", pages)
    if attention.head_dim not in _PROMPT_DIMS:
        allowed = ", ".join(map(str, _PROMPT_DIMS))
        found.append(f"heads of {attention.head_dim} dims: allowed are {allowed}; use own")
    return found


def _not_bf16(recipe: Recipe, op: str, pages: KvFormat) -> list[str]:
    if pages == "bf16":
        return []
    return [
        f"kv_cache.dtype = {recipe.kv_cache.dtype}: it reads pages in bf16; "
        f"use kv_cache.dtype = bf16, or kernels.{op} = own"
    ]


def _page_size(recipe: Recipe, allowed_sizes: tuple[int, ...]) -> list[str]:
    if recipe.kv_cache.page_size in allowed_sizes:
        return []
    allowed = ", ".join(map(str, allowed_sizes))
    return [f"kv_cache.page_size = {recipe.kv_cache.page_size}: allowed are {allowed}"]
