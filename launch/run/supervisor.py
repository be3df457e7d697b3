"""Supervises a cluster that serves: replaces lost processes, drains and stops the rest."""

from __future__ import annotations

import signal
import time

from ...engine.protocol.cluster_state import ClusterState
from ..cluster.cluster import Cluster, Death, LaunchError
from ..recipe.recipe import Recipe
from ..terminal.interrupts import Interrupts
from ..terminal.screen import Screen
from .acceptor import Acceptor
from .last_resort import LastResort
from .launcher_link import LauncherLink
from .replacements import Replacements
from .roster import Roster

SILENCE_SECONDS = 30.0
UNTAKEN_SECONDS = 10.0
STOP_SECONDS = 10.0
TERMINATE_SECONDS = 3.0
CLOSE_SECONDS = 20.0
_POLL = 0.1


class Supervisor:
    """A cluster that serves. ``start`` makes it; call ``watch``, then ``drain``.

    Both raise LaunchError when the cluster cannot go on.
    """

    def __init__(
        self,
        recipe: Recipe,
        screen: Screen,
        interrupts: Interrupts,
        acceptor: Acceptor,
        cluster: Cluster,
        roster: Roster,
        link: LauncherLink,
    ) -> None:
        self._recipe = recipe
        self._screen = screen
        self._interrupts = interrupts
        self._acceptor = acceptor
        self._cluster = cluster
        self._roster = roster
        self._link = link
        self._replacements = Replacements(cluster, recipe.cluster.start_deadline)
        self._killed: set[tuple[str, int]] = set()  # hung processes, by host and pid

    def watch(self) -> None:
        """Replaces ranks and frontends that die; returns when told to stop."""
        while not self._interrupts.count:
            state = self._link.read(_POLL)
            self._roster.read(0.0)
            for cause, deaths in self._roster.causes(self._roster.deaths()):
                self._replace(cause, deaths)
            if state is not None and state.phase == "failed":
                raise LaunchError(f"the controller gave up: {state.reason}")
            self._acceptor.check()
            self._kill_hung(state)
            if news := self._replacements.news():
                self._screen.say(news)
            seconds = self._replacements.recovered(state)
            if seconds is not None and state is not None:
                self._screen.say(f"all ranks serve again after {seconds:.1f} s, in epoch {state.epoch}")
            reports = self._roster.reports
            self._replacements.check_ready({name for name in reports if reports[name].phase == "ready"})
            if time.monotonic() - self._link.heard > SILENCE_SECONDS:
                raise LaunchError(f"no message from the controller for {SILENCE_SECONDS:g} s")

    def _kill_hung(self, state: ClusterState | None) -> None:
        """Kills ranks that the controller reports hung and frontends that take no connections.

        Their deaths are then handled like any other.
        """
        reported = () if state is None else state.ranks
        ranks = {f"rank {rank.rank}": rank.pid for rank in reported if rank.state == "hung"}
        frontends = {f"frontend {index}" for index in self._acceptor.stuck(UNTAKEN_SECONDS)}
        if not ranks and not frontends:
            return
        for task, place in self._cluster.running():
            hangs = ranks.get(task.name) == place.pid or task.name in frontends
            if not hangs or (place.host, place.pid) in self._killed:
                continue
            self._killed.add((place.host, place.pid))
            how = "in the middle of a step"
            if task.name not in ranks:
                how = f"and has taken no connection for {UNTAKEN_SECONDS:g} s"
            self._screen.say(f"{task.name} hangs {how}; killing it")
            self._cluster.signal(task, signal.SIGKILL)

    def _replace(self, cause: str, deaths: list[Death]) -> None:
        """Replaces processes that died of one cause. The controller cannot be replaced."""
        if any(death.task.role not in ("rank", "frontend") for death in deaths):
            raise LaunchError(cause)
        one, lost_rank = len(deaths) == 1, any(death.task.role == "rank" for death in deaths)
        action = "starting another in its place" if one else "starting others in their places"
        effect = "requests wait" if lost_rank else "its streams have ended"
        self._screen.say(f"{cause}; {action}, {effect}")
        epoch = self._link.state.epoch if self._link.state is not None else 0
        for death in deaths:
            ready = self._roster.forget(death.task.name)
            if death.task.role == "frontend":
                self._replacements.replace_frontend(death, cause)
            else:
                self._link.rank_lost(death.task.index, cause)
                self._replacements.replace(death, cause, ready=ready, epoch=epoch)

    # ------------------------------------------------------------------ stop

    def drain(self) -> int:
        """Lets running requests finish, then stops every process; returns the exit code."""
        allowed = self._recipe.cluster.drain_deadline
        state = self._link.state
        running = 0 if state is None else state.num_running
        self._screen.say(f"{self._interrupts.name}: draining, {running} requests running")
        self._link.drain(allowed)
        end = time.monotonic() + allowed + STOP_SECONDS
        while state is None or state.phase != "drained":
            state = self._link.read(_POLL)
            for death in self._roster.deaths():
                cause = self._roster.cause(death)
                if death.task.role != "frontend":
                    raise LaunchError(f"while draining: {cause}")
                self._screen.say(f"while draining: {cause}; its streams have ended")
            if state is not None and state.phase == "failed":
                raise LaunchError(f"while draining: the controller gave up: {state.reason}")
            if time.monotonic() > end:
                raise LaunchError(
                    f"the controller had not drained {STOP_SECONDS:g} s after "
                    f"cluster.drain_deadline ({allowed:g} s)"
                )
        self._screen.say("drained; stopping")
        with LastResort(STOP_SECONDS + TERMINATE_SECONDS + CLOSE_SECONDS, "stopping"):
            return self._stop()

    def _stop(self) -> int:
        """Stops every process, terminating those that do not stop in time."""
        self._acceptor.close()
        self._link.stop("shut down")
        code = 0
        for number, seconds in ((None, STOP_SECONDS), (signal.SIGTERM, TERMINATE_SECONDS)):
            for task, _ in self._cluster.running():
                if number is not None:
                    self._screen.say(f"{task.name} did not stop in {STOP_SECONDS:g} s; terminating it")
                    self._cluster.signal(task, number)
                    code = 1
            end = time.monotonic() + seconds
            while self._cluster.running() and time.monotonic() < end:
                for death in self._roster.deaths(stopping=True):
                    if death.code != 0:
                        self._screen.say(f"while stopping: {self._roster.cause(death)}")
                        code = 1
                time.sleep(_POLL / 5)
        return code
