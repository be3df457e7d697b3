"""A run of a cluster from its recipe: start, watch, drain, stop."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from ...engine.models.config import ModelConfig, load_config
from ...engine.protocol.cluster_state import ClusterState
from ..cluster.cluster import Cluster, Death, LaunchError
from ..cluster.ports import base_url, reachable, url_elsewhere
from ..cluster.reaper import Reaper
from ..environment import prepare_ray
from ..preflight.check import preflight, refuse_errors
from ..recipe.recipe import Recipe, RecipeError, model_directory
from ..recipe.resolve import check_model
from ..terminal.interrupts import Interrupted, Interrupts
from ..terminal.screen import Screen
from .acceptor import Acceptor
from .controller_link import ControllerLink
from .first_token import FirstToken
from .keyring import Keyring, process_names
from .last_resort import LastResort
from .lobby_desk import LobbyDesk
from .rendezvous import Rendezvous
from .replacements import Replacements
from .roster import Roster
from .run_folder import RunFolder
from .tasks import Site, controller_task, frontend_task, rank_task

CONTROLLER_SECONDS = 60.0
FIRST_TOKEN_SECONDS = 120.0
SILENCE_SECONDS = 30.0
UNTAKEN_SECONDS = 10.0
STOP_SECONDS = 10.0
TERMINATE_SECONDS = 3.0
CLOSE_SECONDS = 20.0
_POLL = 0.1


def serve(recipe: Recipe, folder: Path, screen: Screen, interrupts: Interrupts) -> int:
    """Starts the cluster of ``recipe`` (whose file lies in ``folder``) and serves until told to
    stop; returns the exit code.

    Raises RecipeError for a recipe that does not fit its model, ValueError for a model that cannot
    be served here.
    """
    path = model_directory(recipe, folder)
    try:
        config = load_config(path)
    except ValueError as error:
        raise ValueError(f"model.path: {error}") from None
    if found := check_model(recipe, config):
        raise RecipeError("the recipe does not fit the model\n" + "\n".join(f"  {line}" for line in found))
    for warning in refuse_errors(preflight(recipe, folder)):
        screen.say(f"warning: {warning}")
    run = RunFolder(recipe.cluster.log_dir)
    supervisor = Supervisor(recipe, config, path, run.path, screen, interrupts)
    code = 1
    try:
        supervisor.start()
        supervisor.watch()
        code = supervisor.drain()
    except LaunchError as error:
        screen.error(str(error))
    except Interrupted as error:
        screen.error(f"{error} before the cluster was ready")
    except KeyboardInterrupt:
        screen.error("stopped at once; running requests were cut off")
    finally:
        supervisor.close()
        kept = run.end(failed=code != 0)
        screen.say(f"stopped; logs: {run.path}" if kept else "stopped")
    return code


class Supervisor:
    """One run. ``start``, ``watch`` and ``drain`` raise LaunchError on a failure; ``close`` must
    follow in any case.
    """

    def __init__(
        self,
        recipe: Recipe,
        config: ModelConfig,
        model_path: Path,
        run_folder: Path,
        screen: Screen,
        interrupts: Interrupts,
    ) -> None:
        self._recipe = recipe
        self._config = config
        self._model_path = model_path
        self._folder = run_folder
        self._screen = screen
        self._interrupts = interrupts
        self._reaper = Reaper()
        self._acceptor: Acceptor | None = None
        self._cluster: Cluster | None = None
        self._desk: LobbyDesk | None = None
        self._store: Rendezvous | None = None
        self._link: ControllerLink | None = None
        self._roster: Roster | None = None
        self._replacements: Replacements | None = None
        self._ended: set[tuple[str, int]] = set()  # processes that were killed because they hung

    # ------------------------------------------------------------------ start

    def start(self) -> None:
        """Brings every process up and proves it with one token through the front door."""
        recipe, screen = self._recipe, self._screen
        self._acceptor = Acceptor(recipe.frontend.host, recipe.frontend.port, recipe.frontend.processes)
        site = self._open()
        roster, cluster, store = self._roster, self._cluster, self._store
        assert roster is not None and cluster is not None and store is not None
        screen.say("starting the controller")
        cluster.start([controller_task(site)])
        roster.wait(
            ["controller 0"],
            CONTROLLER_SECONDS,
            lambda report: bool(report.address) or report.phase == "ready",
        )
        step_address, bulk_address, frontend_address = roster.reports["controller 0"].address
        screen.mark("controller")

        frontends = [
            frontend_task(site, index, frontend_address) for index in range(recipe.frontend.processes)
        ]
        beside = "the frontend" if len(frontends) == 1 else f"{len(frontends)} frontends"
        screen.say(f"starting {recipe.world} ranks ({site.device}, {site.dtype}) and {beside}")
        self._link = ControllerLink(frontend_address, site.keyring.to_controller("launcher"))
        ranks = [
            rank_task(site, rank, step_address, bulk_address, (store.host, store.port))
            for rank in range(recipe.world)
        ]
        cluster.start([*ranks, *frontends])
        self._wait_ready([task.name for task in ranks], [task.name for task in frontends])
        self._acceptor.open()
        self._first_token(self._acceptor.port)
        key = recipe.frontend.api_keys[0] if recipe.frontend.api_keys else None
        door = recipe.frontend.host, self._acceptor.port
        screen.ready(base_url(*door), url_elsewhere(*door), site.served_name, key)

    def _open(self) -> Site:
        """The cluster, and what the launcher itself offers to its processes."""
        recipe, screen, acceptor = self._recipe, self._screen, self._acceptor
        assert acceptor is not None
        screen.say(
            "starting Ray" if recipe.cluster.backend == "ray" else "starting processes on this machine"
        )
        try:
            self._cluster = self._open_cluster()
        except (
            SystemExit
        ):  # Ray's own answer to SIGTERM, from within ray.init until the handlers are ours again
            raise Interrupted("SIGTERM") from None
        self._interrupts.install()
        self._interrupts.check()
        host = self._cluster.host
        self._store = Rendezvous(host)
        keyring = Keyring(process_names(recipe))
        self._desk = LobbyDesk(host, *keyring.lobby, allowed=keyring.allowed)
        self._roster = Roster(self._cluster, self._desk, self._interrupts, screen.show)
        device = self._device(self._cluster.gpus_per_node)
        return Site(
            recipe, self._config, self._model_path, host, device, self._desk.address, keyring, acceptor.spec
        )

    def _open_cluster(self) -> Cluster:
        recipe = self._recipe.cluster
        if recipe.backend == "local":
            from ..cluster.local import LocalCluster

            self._screen.mark("cluster")
            return LocalCluster(self._folder)
        prepare_ray(recipe.address)
        from ..cluster.ray_cluster import RayCluster, needs_of

        cluster = RayCluster(
            self._folder, needs_of(self._recipe), address=recipe.address, mark=self._screen.mark
        )
        if cluster.scratch is not None:
            self._reaper.inherit(cluster.scratch)
        return cluster

    def _device(self, gpus_per_node: int) -> str:
        cluster = self._recipe.cluster
        if cluster.device == "cpu" or (cluster.device == "auto" and gpus_per_node == 0):
            return "cpu"
        if gpus_per_node < cluster.ranks_per_node:
            raise LaunchError(
                f"cluster.device = {cluster.device}: cluster.ranks_per_node ({cluster.ranks_per_node}) needs as many GPUs on a node, "
                f"found {gpus_per_node}"
            )
        return "cuda"

    def _wait_ready(self, ranks: list[str], frontends: list[str]) -> None:
        roster, store, recipe = self._roster, self._store, self._recipe
        assert roster is not None and store is not None
        end = time.monotonic() + recipe.cluster.start_deadline
        roster.wait(ranks, recipe.cluster.start_deadline)
        store.check()
        self._screen.mark("load", roster.slowest(ranks))
        left = max(CONTROLLER_SECONDS, end - time.monotonic())
        roster.wait(["controller 0", *frontends], left)
        self._screen.mark("frontend")

    def _first_token(self, port: int) -> None:
        assert self._roster is not None
        frontend = self._recipe.frontend
        key = frontend.api_keys[0] if frontend.api_keys else frontend.admin_key
        asked = FirstToken(reachable(frontend.host), port, key, FIRST_TOKEN_SECONDS)
        while not asked.done(_POLL):
            self._interrupts.check()
            self._roster.read(0.0)
            self._roster.check()
        self._screen.mark("first token")

    # ------------------------------------------------------------------ serve

    def watch(self) -> None:
        """Returns when told to stop; replaces ranks and frontends that die. Raises LaunchError when
        the cluster cannot go on.
        """
        assert (
            self._roster is not None
            and self._link is not None
            and self._cluster is not None
            and self._acceptor is not None
        )
        self._replacements = Replacements(self._cluster, self._recipe.cluster.start_deadline)
        while not self._interrupts.count:
            state = self._link.read(_POLL)
            self._roster.read(0.0)
            for obituary, deaths in self._roster.obituaries(self._roster.deaths()):
                self._lost(obituary, deaths)
            if state is not None and state.phase == "failed":
                raise LaunchError(f"the controller gave up: {state.reason}")
            self._acceptor.check()
            self._end_hung(state)
            if news := self._replacements.news():
                self._screen.say(news)
            seconds = self._replacements.recovered(state)
            if seconds is not None and state is not None:
                self._screen.say(f"all ranks serve again after {seconds:.1f} s, in epoch {state.epoch}")
            self._replacements.check_ready(
                {name for name, report in self._roster.reports.items() if report.phase == "ready"}
            )
            if time.monotonic() - self._link.heard > SILENCE_SECONDS:
                raise LaunchError(f"the controller has said nothing for {SILENCE_SECONDS:g} s")

    def _end_hung(self, state: ClusterState | None) -> None:
        """Kills ranks that the controller says hang, and frontends that leave connections untaken;
        their deaths are then like any other.
        """
        assert self._cluster is not None and self._acceptor is not None
        ranks = (
            {f"rank {rank.rank}": rank.pid for rank in state.ranks if rank.state == "hung"}
            if state is not None
            else {}
        )
        frontends = {f"frontend {index}" for index in self._acceptor.stuck(UNTAKEN_SECONDS)}
        for task, place in self._cluster.running() if ranks or frontends else ():
            hangs = ranks.get(task.name) == place.pid or task.name in frontends
            if hangs and (place.host, place.pid) not in self._ended:
                self._ended.add((place.host, place.pid))
                how = (
                    "in the middle of a step"
                    if task.name in ranks
                    else f"and has taken no connection for {UNTAKEN_SECONDS:g} s"
                )
                self._screen.say(f"{task.name} hangs {how}; killing it")
                self._cluster.signal(task, signal.SIGKILL)

    def _lost(self, obituary: str, deaths: list[Death]) -> None:
        """Processes have ended while serving, by one cause. Others take the places of ranks and
        frontends; without a controller nothing goes on.
        """
        assert self._roster is not None and self._link is not None and self._replacements is not None
        if any(death.task.role not in ("rank", "frontend") for death in deaths):
            raise LaunchError(obituary)
        places = "another in its place" if len(deaths) == 1 else "others in their places"
        effect = (
            "requests wait"
            if any(death.task.role == "rank" for death in deaths)
            else "its streams have ended"
        )
        self._screen.say(f"{obituary}; starting {places}, {effect}")
        epoch = self._link.state.epoch if self._link.state is not None else 0
        for death in deaths:
            ready = self._roster.forget(death.task.name)
            if death.task.role == "frontend":
                self._replacements.replace_frontend(death, obituary)
            else:
                self._link.rank_lost(death.task.index, obituary)
                self._replacements.replace(death, obituary, ready=ready, epoch=epoch)

    # ------------------------------------------------------------------ stop

    def drain(self) -> int:
        """Lets running requests finish, then stops every process in order. Returns the exit
        code.
        """
        assert self._roster is not None and self._link is not None
        allowed = self._recipe.cluster.drain_deadline
        state = self._link.state
        self._screen.say(
            f"{self._interrupts.name}: draining, {0 if state is None else state.num_running} requests running"
        )
        self._link.drain(allowed)
        end = time.monotonic() + allowed + STOP_SECONDS
        while state is None or state.phase != "drained":
            state = self._link.read(_POLL)
            for death in self._roster.deaths():
                obituary = self._roster.obituary(death)
                if death.task.role != "frontend":
                    raise LaunchError(f"while draining: {obituary}")
                self._screen.say(f"while draining: {obituary}; its streams have ended")
            if state is not None and state.phase == "failed":
                raise LaunchError(f"while draining: the controller gave up: {state.reason}")
            if time.monotonic() > end:
                raise LaunchError(
                    f"the controller had not drained {STOP_SECONDS:g} s after the {allowed:g} s of cluster.drain_deadline"
                )
        self._screen.say("drained; stopping")
        with LastResort(STOP_SECONDS + TERMINATE_SECONDS + CLOSE_SECONDS, "stopping"):
            return self._stop()

    def _stop(self) -> int:
        assert (
            self._cluster is not None
            and self._roster is not None
            and self._link is not None
            and self._acceptor is not None
        )
        self._acceptor.close()
        self._link.stop("shut down")
        code = 0
        for number, seconds in ((None, STOP_SECONDS), (15, TERMINATE_SECONDS)):
            for task, _ in self._cluster.running():
                if number is not None:
                    self._screen.say(f"{task.name} did not stop in {STOP_SECONDS:g} s; terminating it")
                    self._cluster.signal(task, number)
                    code = 1
            end = time.monotonic() + seconds
            while self._cluster.running() and time.monotonic() < end:
                for death in self._roster.deaths(stopping=True):
                    if death.code != 0:
                        self._screen.say(f"while stopping: {self._roster.obituary(death)}")
                        code = 1
                time.sleep(_POLL / 5)
        return code

    def close(self) -> None:
        """Kills what is left, waits until it is gone, and closes everything. Nothing of the run
        stays but its logs.
        """
        self._interrupts.muted = True
        self._screen.hide()
        with LastResort(CLOSE_SECONDS, "closing"):
            for part in (self._acceptor, self._link, self._desk, self._cluster, self._store):
                if part is not None:
                    part.close()
            self._reaper.finish()
