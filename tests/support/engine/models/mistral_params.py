"""Mistral's own description of Mistral-Large-3, as the recipe for it has it: as published
(https://huggingface.co/mistralai/Mistral-Large-3-675B-Instruct-2512), less most of the vision
encoder's.
"""

from __future__ import annotations

import json
from typing import Any

from lockstep.launch.recipe.file import find_recipe

FOLDER = find_recipe("demo").parent / "configs/mistral-large-3"
LARGE_3: dict[str, Any] = json.loads((FOLDER / "params.json").read_text(encoding="utf-8"))
COMPRESSED: dict[str, Any] = LARGE_3["quantization_config"]
