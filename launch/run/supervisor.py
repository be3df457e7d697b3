"""Supervises a cluster that serves: replaces lost processes, drains and stops the rest."""

from __future__ import annotations

import contextlib
import signal
import time
from dataclasses import dataclass, replace

from ...engine.protocol.cluster_state import ClusterState
from ...engine.protocol.turns import Turns
from ..cluster.cluster import Cluster, Death, LaunchError
from ..recipe.recipe import Recipe
from ..terminal.interrupts import Interrupts
from ..terminal.screen import Screen
from .acceptor import Acceptor
from .last_resort import LastResort
from .launcher_link import LauncherLink
from .quarantine import DEATHS, Quarantine
from .replacements import FRONTEND_SECONDS, WINDOW_SECONDS, Replacements
from .roster import Roster
from .tasks import successor_task

NOTICED_SECONDS = 10.0
UNTAKEN_SECONDS = 10.0
STOP_SECONDS = 10.0
TERMINATE_SECONDS = 3.0
CLOSE_SECONDS = 20.0
_POLL = 0.1


def end_streams(cluster: Cluster) -> None:
    """Asks the frontends that still run to leave, so that open streams end with an error instead of
    being cut off. Waits for them, though not for long.
    """
    with contextlib.suppress(LaunchError):  # the cluster itself is lost
        frontends = [task for task, _ in cluster.running() if task.role == "frontend"]
        for task in frontends:
            cluster.signal(task, signal.SIGTERM)
        end = time.monotonic() + TERMINATE_SECONDS
        while frontends and time.monotonic() < end:
            time.sleep(_POLL / 5)
            ended = {death.task.name for death in cluster.deaths()}
            frontends = [task for task in frontends if task.name not in ended]


@dataclass(frozen=True)
class _Hang:
    """A process to be killed, and how it hangs; ``pid`` only if another may have its name."""

    name: str
    how: str
    pid: int | None = None


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
        self._quarantine = Quarantine()
        self._degraded = ""
        self._silent = False
        self._without: tuple[int, ...] = ()
        self._turns = Turns(time.monotonic())

    def watch(self) -> None:
        """Replaces processes that die; returns when told to stop."""
        while not self._interrupts.count:
            state = self._link.read(_POLL)
            now = time.monotonic()
            self._replacements.stood_still(self._turns.take(now))
            self._roster.read(0.0)
            for cause, deaths in self._roster.causes(self._roster.deaths()):
                self._replace(cause, deaths)
            if state is not None and state.phase == "failed":
                raise LaunchError(f"the controller gave up: {state.reason}")
            self._acceptor.check()
            if self._turns.settled(now):
                self._check_silence(now)
                self._kill_hung(state)
            self._follow_replacements(state)

    def _follow_replacements(self, state: ClusterState | None) -> None:
        replacements = self._replacements
        replacements.start_due()
        if news := replacements.news():
            self._screen.say(news)
        seconds = replacements.recovered(state)
        if state is not None:
            self._tell_of_ranks(state, seconds)
        slow = f"is not ready after {FRONTEND_SECONDS:g} s"
        self._kill([_Hang(name, slow) for name in replacements.slow_frontends(self._roster.ready())])
        degraded = replacements.degraded()
        if degraded != self._degraded:
            self._degraded = degraded
            self._link.degraded(degraded)

    def _tell_of_ranks(self, state: ClusterState, seconds: float | None) -> None:
        """Reports which ranks serve after a pause of ``seconds``, and the return of ranks that the
        others went on without.
        """
        lost = tuple(rank.rank for rank in state.ranks if rank.state == "lost")
        after = "" if seconds is None else f" after {seconds:.1f} s"
        if state.phase not in ("serving", "draining") or (seconds is None and lost == self._without):
            return
        names = ", ".join(f"rank {rank}" for rank in lost)
        if lost:
            self._screen.say(f"the others serve{after} without {names}, in epoch {state.epoch}")
        else:
            self._screen.say(f"all ranks serve again{after}, in epoch {state.epoch}")
        self._without = lost

    def _check_silence(self, now: float) -> None:
        """Reports when the controller falls silent and when it answers again. Raises LaunchError
        after ``cluster.pause_deadline``.
        """
        silence, deadline = now - self._link.heard, self._recipe.cluster.pause_deadline
        if silence > deadline:
            raise LaunchError(
                f"no message from the controller for {deadline:g} s, which is cluster.pause_deadline"
            )
        silent = silence > NOTICED_SECONDS
        if silent and not self._silent:
            self._screen.say(
                f"the controller has been silent for {silence:.0f} s; requests wait, up to {deadline:g} s"
            )
        elif self._silent and not silent:
            self._screen.say("the controller answers again")
        self._silent = silent

    def _kill_hung(self, state: ClusterState | None) -> None:
        """Kills ranks that the controller reports hung and frontends that take no connections.

        Their deaths are then handled like any other.
        """
        reported = () if state is None else state.ranks
        ranks = [
            _Hang(f"rank {rank.rank}", "hangs in the middle of a step", rank.pid)
            for rank in reported
            if rank.state == "hung"
        ]
        untaken = f"hangs and has taken no connection for {UNTAKEN_SECONDS:g} s"
        frontends = [_Hang(f"frontend {index}", untaken) for index in self._acceptor.stuck(UNTAKEN_SECONDS)]
        self._kill(ranks + frontends)

    def _kill(self, hangs: list[_Hang]) -> None:
        running = self._cluster.running() if hangs else []
        for hang in hangs:
            for task, place in running:
                found = task.name == hang.name and hang.pid in (None, place.pid)
                if found and self._roster.kill_expected(place, hang.how):
                    self._screen.say(f"{task.name} {hang.how}; killing it")
                    self._cluster.signal(task, signal.SIGKILL)

    def _replace(self, cause: str, deaths: list[Death]) -> None:
        """Replaces processes that died of one cause."""
        epoch = self._link.state.epoch if self._link.state is not None else 0
        for last in self._quarantine.take(deaths):
            self._leave_node_of(last)
        delay, paused, others = 0.0, False, self._acceptor.num_ready > 0
        for death in deaths:
            self._roster.forget(death.task.name)
            if death.task.role == "frontend":
                delay = max(delay, self._replacements.replace_frontend(death, others=others))
                continue
            paused = True
            if death.task.role == "controller":
                delay = max(delay, self._replace_controller(death, cause, epoch))
            else:
                self._link.rank_lost(death.task.index, cause, death.place.pid)
                delay = max(delay, self._replacements.replace(death, cause, epoch=epoch))
        action = "starting another in its place" if len(deaths) == 1 else "starting others in their places"
        when = f" in {delay:g} s" if delay else ""
        effect = "requests wait" if paused else "its streams have ended"
        self._screen.say(f"{cause}; {action}{when}, {effect}")

    def _leave_node_of(self, death: Death) -> None:
        """Moves the ranks of a node to another one; kills those that still run there."""
        assert death.task.node is not None
        to, host = self._cluster.leave_node(death.task.node), death.place.host
        what = f"its ranks move to {to}" if to else "no other node has room for its ranks, which stay"
        self._screen.say(f"{host}: ranks died {DEATHS} times there within {WINDOW_SECONDS:g} s; {what}")
        if to:
            here = [task.name for task, _ in self._cluster.running() if task.node == death.task.node]
            self._quarantine.moves(here)
            self._kill([_Hang(name, f"moves from {host} to {to}") for name in here])

    def _replace_controller(self, death: Death, cause: str, epoch: int) -> float:
        """Starts a controller at the addresses of the one that died. Returns the delay in seconds.

        Raises LaunchError for one that ended cleanly: it has asked all others to stop.
        """
        if death.code == 0:
            raise LaunchError(cause)
        addresses = self._roster.addresses[death.task.name]
        task = successor_task(death.task, addresses, self._link.state)
        delay = self._replacements.replace_controller(replace(death, task=task), cause, epoch=epoch)
        self._link.greet()
        return delay

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
            if state is not None and state.phase not in ("draining", "drained"):  # it may be lost
                self._link.drain(max(0.0, end - STOP_SECONDS - time.monotonic()))
            for cause, deaths in self._roster.causes(self._roster.deaths()):
                self._replace(f"while draining: {cause}", deaths)
            self._follow_replacements(state)
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
        """Stops every process, terminating those that do not stop in time: the controller's Stop
        may be lost while a connection is being re-established. A clean exit is then no failure.
        """
        self._acceptor.close()
        self._link.stop("shut down")
        starting = {task.name for task, _ in self._cluster.running()} - self._roster.ready()
        for task, _ in self._cluster.running():
            if task.name in starting:  # a replacement that is no longer needed
                self._cluster.signal(task, signal.SIGKILL)
            elif task.role == "frontend":
                self._cluster.signal(task, signal.SIGTERM)
        code = 0
        for number, seconds in ((None, STOP_SECONDS), (signal.SIGTERM, TERMINATE_SECONDS)):
            for task, _ in self._cluster.running():
                if number is not None:
                    self._screen.say(f"{task.name} did not stop in {STOP_SECONDS:g} s; terminating it")
                    self._cluster.signal(task, number)
            end = time.monotonic() + seconds
            while self._cluster.running() and time.monotonic() < end:
                for death in self._roster.deaths(stopping=True):
                    if death.code != 0 and death.task.name not in starting:
                        self._screen.say(f"while stopping: {self._roster.cause(death)}")
                        code = 1
                time.sleep(_POLL / 5)
        return 1 if self._cluster.running() else code
