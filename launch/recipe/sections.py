"""The base of a recipe's sections, and those that name libraries: of kernels and of experts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from .values import switch

LIBRARY_EXCHANGES = ("flashinfer", "deepep", "nccl_ep")
"""Values of ``experts.dispatch`` that name a library for GPUs."""


class RecipeSection(BaseModel):
    """Base of the sections: frozen, refuses unknown keys and converts no values."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, validate_default=False, allow_inf_nan=False
    )


class KernelsSection(RecipeSection):
    linear_fp8: Literal["auto", "own", "deep_gemm"] = Field(
        default="auto",
        description="products of many rows in FP8 on GPUs; auto: own, until another is measured to be faster",
    )
    attention: Literal["auto", "own", "flashinfer", "flashmla"] = Field(
        default="auto",
        description="attention of rows that decode on GPUs; flashinfer: over pages in bf16; flashmla: over "
        "latents, in bf16, or in fp8 at the positions that an indexer chose; auto: own",
    )
    prompt_attention: Literal["auto", "own", "flash_attn_4"] = Field(
        default="auto",
        description="attention of prompts on GPUs, flash_attn_4 over keys and values in bf16; auto: own",
    )

    @property
    def libraries(self) -> dict[str, str]:
        """By op, the library that is to compute it."""
        named = {
            "linear_fp8": self.linear_fp8,
            "attention": self.attention,
            "prompt_attention": self.prompt_attention,
        }
        return {op: name for op, name in named.items() if name not in ("auto", "own")}


class ExpertsSection(RecipeSection):
    dispatch: Literal["auto", "local", "all_gather", "all_to_all", "flashinfer", "deepep", "nccl_ep"] = Field(
        default="auto",
        description="how tokens reach their experts; flashinfer: by FlashInfer, among GPUs of one NVLink "
        "domain; deepep, nccl_ep: by the low-latency kernels of DeepEP or NCCL EP, also between nodes, in "
        "steps of few tokens; auto: all_to_all on CPUs and on GPUs of several nodes",
    )
    wire: Literal["auto", "full", "fp8"] = Field(
        default="auto",
        description="hidden states on their way to experts: full, in the activations' dtype, or fp8, as FP8 "
        "experts quantise them; auto: fp8 where experts are FP8, which changes no bit (by deepep a few: its "
        "kernels quantise)",
    )
    redundant: int = Field(default=0, ge=0, description="expert slots beyond one per expert, for replicas")
    loads: str | None = Field(
        default=None,
        min_length=1,
        description="file with recorded loads to start balanced by: an answer of /admin/cluster (JSON) or a "
        "routing trace (.npz), relative to the recipe file",
    )
    balance: Annotated[Literal["auto", "off", "on"], BeforeValidator(switch)] = Field(
        default="auto",
        description="move experts between ranks as loads drift; auto: where ranks share experts",
    )
