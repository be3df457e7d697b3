"""What stands in the way of a recipe, before it is started: quickly on this machine, or thoroughly
on every node it would use.
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ...engine.models.config import load_config
from ..capacity.plan import CapacityPlan, plan_recipe
from ..cluster.cluster import LaunchError
from ..cluster.ports import check_port
from ..cluster.reaper import Reaper
from ..environment import prepare_ray, ray_address
from ..recipe.hardware import hardware_names
from ..recipe.recipe import Recipe, RecipeError, model_directory, not_yet
from ..recipe.resolve import check_model
from .finding import Finding
from .judge import Requirements, judge
from .links import judge_clocks, judge_links
from .probe import Questions, look_around

if TYPE_CHECKING:
    from ..cluster.ray_cluster import RayCluster

ROOM_SECONDS = 10.0
QUICK_SECONDS = 5.0
_OBJECT_STORE_BYTES = 100 << 20


def preflight(recipe: Recipe, folder: Path) -> list[Finding]:
    """What can be known of this machine at once; nothing is started. ``folder`` is the recipe
    file's.
    """
    return _recording(recipe) + judge(
        [look_around(_questions(recipe, folder, thorough=False))], _wanted(recipe, _planned(recipe, folder))
    )


def refuse_errors(found: list[Finding]) -> list[Finding]:
    """The warnings among them. Raises ValueError for the errors, a line each."""
    errors = [str(finding) for finding in found if finding.level == "error"]
    if errors:
        raise ValueError(
            errors[0] if len(errors) == 1 else "\n  ".join([f"{len(errors)} things are in the way", *errors])
        )
    return [finding for finding in found if finding.level == "warning"]


def check(recipe: Recipe, folder: Path) -> list[Finding]:
    """Everything, on every node that would be used. Starts Ray where the recipe would, and ends it
    again.
    """
    plan = _planned(recipe, folder)
    questions, wanted = _questions(recipe, folder, thorough=True), _wanted(recipe, plan)
    found = _recipe_findings(recipe, folder, plan) + _recording(recipe) + _port(recipe)
    if recipe.cluster.backend == "local":
        return found + judge([look_around(questions)], wanted)
    return found + _check_ray(recipe, questions, wanted)


def _check_ray(recipe: Recipe, questions: Questions, wanted: Requirements) -> list[Finding]:
    reaper = Reaper()
    prepare_ray(recipe.cluster.address)
    from ..cluster.ray_cluster import RayCluster, needs_of

    cluster: RayCluster | None = None
    with tempfile.TemporaryDirectory(prefix="lockstep-check-", ignore_cleanup_errors=True) as folder:
        try:
            cluster = RayCluster(
                Path(folder), needs_of(recipe), address=recipe.cluster.address, deadline=ROOM_SECONDS
            )
            return _ask_nodes(cluster, questions, wanted)
        except LaunchError as error:
            where = "start Ray on as many nodes as the recipe has, or end what else runs there; only this machine was looked at"
            return [Finding("error", "Ray", str(error), "", where), *judge([look_around(questions)], wanted)]
        finally:
            if cluster is not None:
                cluster.close()
            reaper.finish()


def _ask_nodes(cluster: RayCluster, questions: Questions, wanted: Requirements) -> list[Finding]:
    from .ray_nodes import RayNodes

    used = [cluster.here, *[node for node in cluster.nodes if node.id != cluster.here.id]]
    ok = Finding(
        "ok",
        "Ray",
        f"room for the ranks on {', '.join(map(str, cluster.nodes))}; launched from {cluster.here}",
    )
    nodes = RayNodes(used)
    facts = nodes.facts(questions)
    between = judge_clocks(nodes.clocks()) + judge_links(nodes.links()) if len(used) > 1 else []
    return [ok, *nodes.silent, *judge(facts, wanted), *between]


# --------------------------------------------------------------------------- what the recipe asks for


def _planned(recipe: Recipe, folder: Path) -> CapacityPlan | None:
    """None where the recipe names no hardware to plan with, or no model is there."""
    try:
        return plan_recipe(recipe, folder)
    except RecipeError:
        return None


def _questions(recipe: Recipe, folder: Path, *, thorough: bool) -> Questions:
    logs = Path(recipe.cluster.log_dir or tempfile.gettempdir()).expanduser().absolute()
    recording = [] if recipe.recording is None else [Path(recipe.recording).expanduser().absolute().parent]
    folders = tuple(dict.fromkeys(str(path) for path in (logs, *recording)))
    model = str(model_directory(recipe, folder))
    if thorough:
        return Questions(model, folders)
    return Questions(model, folders, thorough=False, seconds=QUICK_SECONDS)


def _wanted(recipe: Recipe, plan: CapacityPlan | None) -> Requirements:
    hardware = recipe.cluster.hardware
    starts_ray = recipe.cluster.backend == "ray" and (recipe.cluster.address or ray_address()) is None
    return Requirements(
        world=recipe.world,
        ranks_per_node=recipe.cluster.ranks_per_node,
        num_nodes=recipe.cluster.nodes,
        device=recipe.cluster.device,
        gpu=hardware if hardware in hardware_names() and hardware != "cpu" else None,
        rank_memory=None if plan is None else _rank_memory(recipe, plan),
        shm=_OBJECT_STORE_BYTES if starts_ray else 0,
    )


def _rank_memory(recipe: Recipe, plan: CapacityPlan) -> int:
    """What the fullest rank cannot do without; of the pages only what the recipe fixes."""
    return max(
        held.memory.weights.total
        + held.memory.activations
        + held.memory.dispatch
        + held.memory.reserve
        + (held.page_bytes if recipe.kv_cache.memory is None else held.memory.kv_pool)
        for held in plan.ranks
    )


def _recipe_findings(recipe: Recipe, folder: Path, plan: CapacityPlan | None) -> list[Finding]:
    found = [Finding("error", "recipe", line) for line in not_yet(recipe)]
    with contextlib.suppress(ValueError):  # the nodes say what is wrong with the model
        found += [
            Finding("error", "recipe", line)
            for line in check_model(recipe, load_config(model_directory(recipe, folder)))
        ]
    if plan is not None and recipe.cluster.hardware is not None:
        found += [
            Finding("warning", "plan", line, f"cluster.hardware = {recipe.cluster.hardware}")
            for line in plan.misfits
        ]
    return found


def _recording(recipe: Recipe) -> list[Finding]:
    """Whether its folder can be written to is among the questions."""
    if recipe.recording is None or not Path(recipe.recording).expanduser().is_dir():
        return []
    return [
        Finding(
            "error", "recording", f"recording = {recipe.recording}: is a directory", "", "name a file in it"
        )
    ]


def _port(recipe: Recipe) -> list[Finding]:
    host, port = recipe.frontend.host, recipe.frontend.port
    try:
        check_port(host, port)
    except LaunchError as error:
        return [
            Finding(
                "error", "port", str(error), "", "choose another frontend.port, or end what listens there"
            )
        ]
    return [
        Finding(
            "ok",
            "port",
            f"frontend.port = {port} can be listened on at {host}"
            if port
            else "frontend.port = 0 takes a free one",
        )
    ]
