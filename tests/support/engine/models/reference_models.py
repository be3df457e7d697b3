"""transformers' models of checkpoints on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

# Models without a name of their own in transformers, and the model to read them with.
_SAME_AS = {"kimi_k2": "deepseek_v3"}


def model_class(model_type: str) -> Any:
    """transformers' class with an output head. AutoModelForCausalLM does not know all of them."""
    from transformers import AutoModelForCausalLM, Mistral4ForCausalLM

    return Mistral4ForCausalLM if model_type == "mistral4" else AutoModelForCausalLM


def load_reference(path: Path, dtype: torch.dtype) -> Any:
    """The model of directory ``path`` with attention written out."""
    from transformers import AutoConfig

    config = json.loads((path / "config.json").read_text())
    same_as = _SAME_AS.get(config["model_type"])
    described = AutoConfig.for_model(**(config | {"model_type": same_as})) if same_as else None
    reference = model_class(config["model_type"]).from_pretrained(
        path, config=described, dtype=dtype, attn_implementation="eager"
    )
    return reference.eval()
