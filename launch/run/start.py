"""Starts a cluster: opens the launcher's own parts, starts every process, asks for one token."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ...engine.models.config import ModelConfig
from ..cluster.cluster import Cluster, LaunchError
from ..cluster.ports import base_url, reachable, url_elsewhere
from ..cluster.reaper import Reaper
from ..environment import prepare_ray
from ..recipe.recipe import Recipe
from ..recipe.resolve import for_gpus
from ..terminal.interrupts import Interrupted, Interrupts
from ..terminal.screen import Screen
from .acceptor import Acceptor
from .first_token import FirstToken
from .keyring import Keyring, process_names
from .launcher_link import LauncherLink
from .lobby_desk import LobbyDesk
from .rendezvous import Rendezvous
from .roster import Roster
from .supervisor import Supervisor, end_streams
from .tasks import Site, controller_task, frontend_task, imports_of_ranks, rank_task

CONTROLLER_SECONDS = 60.0
FIRST_TOKEN_SECONDS = 120.0
_POLL = 0.1


@dataclass(frozen=True)
class Run:
    """A run as asked for. ``folder`` takes the logs. ``placement_i32``: the experts to start with,
    as in ``RankSpec``.
    """

    recipe: Recipe
    config: ModelConfig
    model_path: Path
    folder: Path
    screen: Screen
    interrupts: Interrupts
    placement_i32: bytes = b""


@dataclass(frozen=True)
class _Base:
    """Everything that exists before the first process starts."""

    acceptor: Acceptor
    cluster: Cluster
    store: Rendezvous
    roster: Roster
    site: Site


def start(run: Run, opened: ExitStack) -> Supervisor:
    """Brings every process up and proves it with one token over HTTP.

    ``opened`` gets every part that must be closed, also after a failure. Raises LaunchError when
    the cluster cannot start, Interrupted when the user stops it meanwhile.
    """
    recipe, screen = run.recipe, run.screen
    base = _open(run, opened)
    base.cluster.prepare(imports_of_ranks(base.site))
    screen.say("starting the controller")
    base.cluster.start([controller_task(base.site)])
    base.roster.wait(
        ["controller 0"], CONTROLLER_SECONDS, lambda report: bool(report.address) or report.phase == "ready"
    )
    addresses = base.roster.addresses["controller 0"]
    screen.mark("controller")

    count = recipe.frontend.processes
    beside = "the frontend" if count == 1 else f"{count} frontends"
    weights = ", random weights" if recipe.model.weights == "random" else ""
    kind = f"{base.site.device}, {base.site.dtype}{weights}"
    screen.say(f"starting {recipe.world} ranks ({kind}) and {beside}")
    link = LauncherLink(addresses[2], base.site.keyring.to_controller("launcher"))
    opened.callback(link.close)
    opened.callback(end_streams, base.cluster)
    opened.callback(base.acceptor.close)  # again: now it closes first and refuses connections at once
    _start_others(run, base, addresses)
    base.acceptor.open()
    _ask_first_token(run, base)
    key = recipe.frontend.api_keys[0] if recipe.frontend.api_keys else None
    door = recipe.frontend.host, base.acceptor.port
    screen.ready(base_url(*door), url_elsewhere(*door), base.site.served_name, key)
    return Supervisor(recipe, screen, run.interrupts, base.acceptor, base.cluster, base.roster, link)


def _open(run: Run, opened: ExitStack) -> _Base:
    """Opens the cluster and the sockets that the launcher offers to its processes."""
    recipe, screen = run.recipe, run.screen
    reaper = Reaper()
    opened.callback(reaper.finish)
    acceptor = Acceptor(recipe.frontend.host, recipe.frontend.port, recipe.frontend.processes)
    opened.callback(acceptor.close)
    uses_ray = recipe.cluster.backend == "ray"
    screen.say("starting Ray" if uses_ray else "starting processes on this machine")
    try:
        cluster = open_cluster(run, reaper)
    except SystemExit:  # Ray's answer to SIGTERM inside ray.init, before our handlers are back
        raise Interrupted("SIGTERM") from None
    after_cluster = opened.enter_context(ExitStack())
    opened.callback(cluster.close)
    run.interrupts.install()
    run.interrupts.check()
    keyring = Keyring(process_names(recipe))
    store = Rendezvous(cluster.host, *keyring.store, allowed=keyring.ranks)
    after_cluster.callback(store.close)
    desk = LobbyDesk(cluster.host, *keyring.lobby, allowed=keyring.allowed)
    opened.callback(desk.close)
    site = Site(
        recipe=recipe,
        config=run.config,
        model_path=run.model_path,
        host=cluster.host,
        device=_device(recipe, cluster.gpus_per_node),
        lobby_address=desk.address,
        keyring=keyring,
        acceptor=acceptor.spec,
        placement_i32=run.placement_i32,
    )
    return _Base(acceptor, cluster, store, Roster(cluster, desk, run.interrupts, screen.show), site)


def open_cluster(run: Run, reaper: Reaper) -> Cluster:
    """The cluster of ``cluster.backend``, without processes yet."""
    recipe = run.recipe.cluster
    if recipe.backend == "local":
        from ..cluster.local import LocalCluster

        run.screen.mark("cluster")
        return LocalCluster(run.folder)
    prepare_ray(recipe.address)
    from ..cluster.ray_cluster import RayCluster, needs_of

    cluster = RayCluster(run.folder, needs_of(run.recipe), address=recipe.address, mark=run.screen.mark)
    if cluster.scratch is not None:
        reaper.inherit(cluster.scratch)
    return cluster


def _device(recipe: Recipe, gpus_per_node: int) -> str:
    """The device of every rank: cpu or cuda."""
    cluster = recipe.cluster
    if cluster.device == "cpu" or (cluster.device == "auto" and gpus_per_node == 0):
        if lines := for_gpus(recipe):
            raise LaunchError("; ".join(lines))
        return "cpu"
    if gpus_per_node < cluster.ranks_per_node:
        raise LaunchError(
            f"cluster.device = {cluster.device}: cluster.ranks_per_node = {cluster.ranks_per_node} needs "
            f"as many GPUs per node, found {gpus_per_node}"
        )
    return "cuda"


def _start_others(run: Run, base: _Base, addresses: tuple[str, ...]) -> None:
    """Starts ranks and frontends, and waits until all are ready."""
    recipe, site = run.recipe, base.site
    step_address, bulk_address, frontend_address = addresses
    store = base.store.address
    ranks = [rank_task(site, rank, step_address, bulk_address, store) for rank in range(recipe.world)]
    frontends = [frontend_task(site, index, frontend_address) for index in range(recipe.frontend.processes)]
    base.cluster.start([*ranks, *frontends])
    names = [task.name for task in ranks]
    deadline = recipe.cluster.start_deadline
    end = time.monotonic() + deadline
    base.roster.wait(names, deadline)
    if compiling := base.roster.seconds_compiling(names):
        run.screen.mark_part("compile", compiling)
    run.screen.mark("load", base.roster.slowest(names))
    left = max(CONTROLLER_SECONDS, end - time.monotonic())
    base.roster.wait(["controller 0", *(task.name for task in frontends)], left)
    run.screen.mark("frontend")


def _ask_first_token(run: Run, base: _Base) -> None:
    frontend = run.recipe.frontend
    key = frontend.api_keys[0] if frontend.api_keys else frontend.admin_key
    asked = FirstToken(reachable(frontend.host), base.acceptor.port, key, FIRST_TOKEN_SECONDS)
    while not asked.done(_POLL):
        run.interrupts.check()
        base.roster.read(0.0)
        base.roster.check()
    run.screen.mark("first token")
