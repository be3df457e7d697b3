"""Hardware profiles: peak rates of a device and its links, with sources
(``recipes/hardware/*.yaml``).
"""

from __future__ import annotations

import difflib
from importlib import resources
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...kernels.cpu_isa import Isa
from .recipe import RecipeError
from .values import Size


class Hardware(BaseModel):
    """One kind of device. Rates are dense peaks, links count one direction, a CPU is a node."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    device: Literal["cpu", "cuda"] = Field(description="cluster.device of ranks on it")
    memory: Size = Field(gt=0, description="bytes available to a process")
    memory_tb_s: float = Field(gt=0, description="memory reads, 10^12 bytes/s")
    fp32_tflops: float = Field(gt=0, description="10^12 operations/s in float32")
    bf16_tflops: float = Field(gt=0, description="10^12 operations/s in bfloat16")
    fp8_tflops: float | None = Field(
        default=None, gt=0, description="10^12 operations/s in float8; none: computes in bfloat16"
    )
    fp4_tflops: float | None = Field(
        default=None, gt=0, description="10^12 operations/s in NVFP4; none: computes in float8"
    )
    ranks_per_node: int = Field(ge=1, description="devices per node")
    near_ranks: int = Field(ge=1, description="ranks that reach each other over the near link")
    near_gb_s: float = Field(gt=0, description="near link (NVLink) of a rank, 10^9 bytes/s")
    far_gb_s: float = Field(gt=0, description="far link (network adapter) of a rank, 10^9 bytes/s")
    latency_us: float = Field(
        default=0.0, ge=0, description="least time of an exchange of any size; 0: unknown"
    )
    isa: Isa | None = Field(
        default=None,
        description="instructions of a CPU, which decide how it holds bf16 weights; none: this machine's",
    )

    def operations(self, dtype: str) -> float:
        """Operations per second of matrix products with weights in ``dtype``."""
        rates = {"fp32": self.fp32_tflops, "bf16": self.bf16_tflops}
        rates["fp8"] = self.fp8_tflops or self.bf16_tflops
        rates["nvfp4"] = self.fp4_tflops or rates["fp8"]
        return 1e12 * rates[dtype]


def hardware_names() -> list[str]:
    """Names of the packaged profiles."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def load_hardware(name: str) -> Hardware:
    """The packaged profile ``name``, or the one in the file of that path. Raises RecipeError."""
    path = Path(name).expanduser() if name.endswith((".yaml", ".yml")) else _folder() / f"{name}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(name, hardware_names(), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        known = ", ".join(hardware_names())
        raise RecipeError(
            f"cluster.hardware = {name}: no such profile{hint} (packaged: {known}; or a path to a YAML file)"
        )
    try:
        return Hardware.model_validate(yaml.safe_load(path.read_bytes()))
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in error.errors()]
        raise RecipeError(f"{path}: not a hardware profile\n" + "\n".join(lines)) from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None


def _folder() -> Path:
    return Path(str(resources.files(__package__.partition(".")[0] + ".recipes"))) / "hardware"
