"""The table of families in ``FAMILIES.md``: what the tests hold of each, read from the tests.

``python -m support.engine.models.families_table`` (in tests/) writes the file;
``tests/engine/models/test_families_table.py`` says when it is out of date.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import lockstep
from lockstep.engine.frontend.formats.choice import OFF, TOOL_FORMATS, choose
from lockstep.engine.models.config import families, load_config
from lockstep.launch.recipe.file import load_recipe
from lockstep.launch.recipe.recipe import contradictions

from ..rank.greedy_prompts import ALL, FAMILIES
from .family_configs import CONFIGS

ROOT = Path(lockstep.__file__).parent
FILE = ROOT / "FAMILIES.md"
TESTS = ROOT / "tests"
_NONE = "—"
_HEAD = (
    "family",
    "`model_type`",
    "logits of transformers",
    "layouts with its greedy tokens",
    "FP8 pages",
    "weights",
    "tool format",
    "recipes",
)
_TEXT = """# Families

{table}

Written by `python -m support.engine.models.families_table` (in `tests/`) from the tests' own lists;
a test fails where it is out of date. The columns:

- **logits of transformers**: variants of the family whose logits equal those of `transformers`
  within 1e-4 in float32, whole, in chunks and decoded; `bf16`: in bf16 they are no further from
  float32 than `transformers` (`tests/engine/models/test_models_numerics.py`).
- **layouts**: `experts`: 1, 2 and 4 data-parallel ranks and both exchanges
  (`tests/engine/rank/test_greedy_layouts.py`); `tensor`: 2 and 4 ranks (`test_greedy_tensor.py`);
  `overlap`: two microbatches (`test_greedy_overlap.py`); `served`: through the front door, split
  and staged (`tests/serving/test_served_layouts.py`).
- **FP8 pages**: `loss`: of logits (`tests/engine/models/test_models_fp8_pages.py`); `layouts`:
  greedy tokens on 1, 2 and 4 ranks (`tests/engine/rank/test_greedy_fp8_pages.py`).
- **weights** beside fp32, fp16 and bf16 that a test of the family loads: FP8 with a scale per block
  or per matrix (`test_weights_fp8.py`), 4 bits (`test_weights_four_bit.py`).
- **tool format** where the chat template does not say otherwise.
- **recipes** for a model of the family; none has run on a GPU unless it says so (`verified:`).
"""


def document() -> str:
    """The whole file."""
    rows = [_HEAD, ("---",) * len(_HEAD), *table()]
    return _TEXT.format(table="\n".join(f"| {' | '.join(row)} |" for row in rows))


def table() -> list[tuple[str, ...]]:
    """A row for each family, in the order of ``_HEAD``."""
    numerics = test_module("engine/models/test_models_numerics.py")
    tensor = test_module("engine/rank/test_greedy_tensor.py").SPLIT
    fp8_pages = test_module("engine/rank/test_greedy_fp8_pages.py").FAMILIES
    fp8 = test_module("engine/models/test_weights_fp8.py")
    four_bit = test_module("engine/models/test_weights_four_bit.py").HELD
    recipes = _recipes()
    rows = []
    for family in families():
        names = _names(family.name, CONFIGS)
        variants = [name for name in numerics.VARIANTS if name.split("-")[0] in names]
        in_bf16 = any(name in numerics.BF16_VARIANTS for name in variants)
        layouts = {
            "experts": _holds(names, FAMILIES),
            "tensor": _holds(names, tensor),
            "overlap": _holds(names, FAMILIES),
            "served": _holds(names, ALL),
        }
        pages = {"loss": _holds(names, CONFIGS), "layouts": _holds(names, fp8_pages)}
        weights = {
            "FP8 by block": _holds(names, fp8.CONFIGS),
            "FP8 by matrix": _holds(names, fp8.WHOLE),
            "4 bits": _holds(names, four_bit),
        }
        formats = sorted({_tool_format(kind) for kind in family.model_types} - {OFF})
        columns = [[name for name, held in column.items() if held] for column in (layouts, pages, weights)]
        columns += [formats, recipes.get(family.name, [])]
        kinds = ", ".join(f"`{kind}`" for kind in family.model_types)
        numbers = f"{len(variants)}{', bf16' * in_bf16}" if variants else _NONE
        rows.append((f"`{family.name}`", kinds, numbers, *map(_listed, columns)))
    return rows


def test_module(path: str) -> ModuleType:
    """The module of tests at ``path``."""
    spec = importlib.util.spec_from_file_location(f"families_table.{Path(path).stem}", TESTS / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _names(family: str, configs: Mapping[str, Any]) -> set[str]:
    """The names under which the tests know a family: kimi_k2 is a deepseek_v3."""
    kinds = next(each.model_types for each in families() if each.name == family)
    return {family} | {name for name in configs if configs[name]()["model_type"] in kinds}


def _holds(names: set[str], tested: Iterable[str]) -> bool:
    return bool(names & set(tested))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or _NONE


def _tool_format(model_type: str) -> str:
    found = choose(None, model_type).tools
    return next((name for name, format in TOOL_FORMATS.items() if format is found), OFF)


def _recipes() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for file in sorted((ROOT / "recipes").glob("*.yaml")):
        recipe, path = load_recipe(file.stem, check=contradictions)
        folder = path.parent / (recipe.model.config or recipe.model.path)
        found.setdefault(load_config(folder).family, []).append(file.stem)
    return found


if __name__ == "__main__":
    FILE.write_text(document(), encoding="utf-8")
