"""The base of a recipe's sections, and the section of kernels that libraries have."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


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
    attention: Literal["auto", "own", "flashinfer"] = Field(
        default="auto",
        description="attention of rows that decode on GPUs, flashinfer over pages in bf16; auto: own",
    )

    @property
    def libraries(self) -> dict[str, str]:
        """By op, the library that is to compute it."""
        named = {"linear_fp8": self.linear_fp8, "attention": self.attention}
        return {op: name for op, name in named.items() if name not in ("auto", "own")}
