"""The placement of experts that a recipe starts with. It needs numpy, so commands that only plan do
not import it.
"""

from __future__ import annotations

from pathlib import Path

from ...moe.balance.layers import Floats
from ...moe.balance.start import read_loads, starting_placement
from .recipe import Recipe
from .resolve import ModelFacts


def recorded_loads(recipe: Recipe, config: ModelFacts, folder: Path) -> Floats | None:
    """The loads of ``experts.loads``, None without it. Raises ValueError when the file does not
    fit.
    """
    if recipe.experts.loads is None:
        return None
    path = folder / Path(recipe.experts.loads).expanduser()
    return read_loads(path, len(config.moe_layers), config.moe.num_experts)


def placement_of_recipe(recipe: Recipe, config: ModelFacts, folder: Path) -> bytes:
    """The placement to start with, packed as in ``RankSpec``; empty for consecutive experts. Raises
    ValueError when ``experts.loads`` does not fit.
    """
    loads_LE, redundant = recorded_loads(recipe, config, folder), recipe.experts.redundant
    if loads_LE is None and not redundant:
        return b""
    num_ranks = recipe.mesh.experts
    # Stages repeat the nodes of the first one where they fill whole nodes.
    node_W = [rank // recipe.cluster.ranks_per_node for rank in range(num_ranks)]
    shape = len(config.moe_layers), config.moe.num_experts, num_ranks
    return starting_placement(*shape, redundant, loads_LE, node_W).experts_LWS.tobytes()
