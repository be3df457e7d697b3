"""Checks before a recipe is started: quickly on this machine, or thoroughly on all its nodes."""

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
from ..recipe.model_folder import model_directory
from ..recipe.recipe import Recipe, RecipeError, not_yet
from ..recipe.records import check_records
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
    """Quick checks of this machine; starts nothing. ``folder`` is the recipe file's."""
    facts = look_around(_questions(recipe, folder, thorough=False))
    here = _recording(recipe) + _records(recipe)
    return here + judge([facts], _requirements(recipe, _planned(recipe, folder)))


def refuse_errors(found: list[Finding]) -> list[Finding]:
    """Returns the warnings. Raises ValueError with the errors, one per line."""
    errors = [str(finding) for finding in found if finding.level == "error"]
    if errors:
        several = [f"{len(errors)} errors", *errors]
        raise ValueError(errors[0] if len(errors) == 1 else "\n  ".join(several))
    return [finding for finding in found if finding.level == "warning"]


def check(recipe: Recipe, folder: Path) -> list[Finding]:
    """All checks, on every node that would be used. Starts Ray if the recipe does, and ends it."""
    plan = _planned(recipe, folder)
    questions = _questions(recipe, folder, thorough=True)
    requirements = _requirements(recipe, plan)
    found = _recipe_findings(recipe, folder, plan) + _recording(recipe)
    found += _records(recipe) + _port(recipe)
    if recipe.cluster.backend == "local":
        return found + judge([look_around(questions)], requirements)
    return found + _check_ray(recipe, questions, requirements)


def _check_ray(recipe: Recipe, questions: Questions, requirements: Requirements) -> list[Finding]:
    reaper = Reaper()
    prepare_ray(recipe.cluster.address)
    from ..cluster.ray_cluster import RayCluster, needs_of

    cluster: RayCluster | None = None
    with tempfile.TemporaryDirectory(prefix="lockstep-check-", ignore_cleanup_errors=True) as folder:
        try:
            cluster = RayCluster(
                Path(folder), needs_of(recipe), address=recipe.cluster.address, deadline=ROOM_SECONDS
            )
            return _ask_nodes(cluster, questions, requirements)
        except LaunchError as error:
            todo = (
                "start Ray on as many nodes as the recipe has, or end other jobs there; "
                "only this machine was checked"
            )
            finding = Finding("error", "Ray", str(error), "", todo)
            return [finding, *judge([look_around(questions)], requirements)]
        finally:
            if cluster is not None:
                cluster.close()
            reaper.finish()


def _ask_nodes(cluster: RayCluster, questions: Questions, requirements: Requirements) -> list[Finding]:
    from .ray_nodes import RayNodes

    used = [cluster.here, *[node for node in cluster.nodes if node.id != cluster.here.id]]
    names = ", ".join(map(str, cluster.nodes))
    ok = Finding("ok", "Ray", f"room for the ranks on {names}; launched from {cluster.here}")
    nodes = RayNodes(used)
    facts = nodes.facts(questions)
    between = judge_clocks(nodes.clocks()) + judge_links(nodes.links()) if len(used) > 1 else []
    return [ok, *nodes.silent, *judge(facts, requirements), *between]


# --------------------------------------------------------------------------- requirements


def _planned(recipe: Recipe, folder: Path) -> CapacityPlan | None:
    """The capacity plan; None if the recipe names no hardware or its model does not exist."""
    try:
        return plan_recipe(recipe, folder)
    except RecipeError:
        return None


def _questions(recipe: Recipe, folder: Path, *, thorough: bool) -> Questions:
    logs = Path(recipe.cluster.log_dir or tempfile.gettempdir()).expanduser().absolute()
    recording = [] if recipe.recording is None else [Path(recipe.recording).expanduser().absolute().parent]
    folders = tuple(dict.fromkeys(str(path) for path in (logs, *recording)))
    model, weights = str(model_directory(recipe, folder)), recipe.model.weights
    if thorough:
        return Questions(model, folders, weights=weights)
    return Questions(model, folders, thorough=False, seconds=QUICK_SECONDS, weights=weights)


def _requirements(recipe: Recipe, plan: CapacityPlan | None) -> Requirements:
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
    """Least bytes of the fullest rank; KV pages count only if the recipe sets their memory."""
    return max(
        held.memory.weights.total
        + held.memory.activations
        + held.memory.dispatch
        + held.memory.captured
        + held.memory.reserve
        + (held.page_bytes if recipe.kv_cache.memory is None else held.memory.kv_pool)
        for held in plan.ranks
    )


def _recipe_findings(recipe: Recipe, folder: Path, plan: CapacityPlan | None) -> list[Finding]:
    found = [Finding("error", "recipe", line) for line in not_yet(recipe)]
    with contextlib.suppress(ValueError):  # the nodes report problems of the model
        config = load_config(model_directory(recipe, folder))
        found += [Finding("error", "recipe", line) for line in check_model(recipe, config)]
        if recipe.experts.loads is not None:
            from ..recipe.placement import recorded_loads  # it needs numpy

            try:
                recorded_loads(recipe, config, folder)
            except ValueError as error:
                found.append(Finding("error", "recipe", str(error)))
    if plan is not None and recipe.cluster.hardware is not None:
        found += [
            Finding("warning", "plan", line, f"cluster.hardware = {recipe.cluster.hardware}")
            for line in plan.misfits
        ]
    return found


def _records(recipe: Recipe) -> list[Finding]:
    return [Finding("error", "recipe", line) for line in check_records(recipe)]


def _recording(recipe: Recipe) -> list[Finding]:
    """Refuses a folder as the recording. Probes check whether its folder is writable."""
    if recipe.recording is None or not Path(recipe.recording).expanduser().is_dir():
        return []
    text = f"recording = {recipe.recording}: is a directory"
    return [Finding("error", "recording", text, "", "name a file in it")]


def _port(recipe: Recipe) -> list[Finding]:
    host, port = recipe.frontend.host, recipe.frontend.port
    try:
        check_port(host, port)
    except LaunchError as error:
        todo = "choose another frontend.port, or end the process that listens there"
        return [Finding("error", "port", str(error), "", todo)]
    text = f"frontend.port = {port} is free on {host}" if port else "frontend.port = 0 takes a free one"
    return [Finding("ok", "port", text)]
