"""The state of every process: its last report, and whether it has ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from ...engine.protocol.cluster_state import Report
from ..cluster.cluster import Cluster, Death, LaunchError, Place
from ..terminal.interrupts import Interrupts
from .lobby_desk import LobbyDesk

_POLL = 0.05
_LAST_REPORT_SECONDS = 0.5


class Roster:
    """Reads the lobby and the cluster's deaths. Calls ``on_report`` for every report, in order."""

    def __init__(
        self,
        cluster: Cluster,
        desk: LobbyDesk,
        interrupts: Interrupts,
        on_report: Callable[[str, Report], None],
    ) -> None:
        self._cluster = cluster
        self._desk = desk
        self._interrupts = interrupts
        self._on_report = on_report
        self.reports: dict[str, Report] = {}
        self.addresses: dict[str, tuple[str, ...]] = {}  # as told first; a successor has them too
        self._ready: dict[str, float] = {}  # since when, in monotonic seconds
        self._compiling: dict[str, tuple[float, float]] = {}  # begin and last report
        self._gone: set[tuple[str, int]] = set()  # host and pid of replaced processes
        self._killed: dict[tuple[str, int], str] = {}  # by the launcher: host and pid, and why

    def read(self, timeout: float) -> None:
        """Reads all reports, waiting up to ``timeout`` seconds for the first."""
        for report in self._desk.read(timeout):
            if (report.host, report.pid) in self._gone:
                continue
            name = f"{report.role} {report.index}"
            if report.address:
                self.addresses.setdefault(name, report.address)
            last = self.reports.get(name)
            if last is None or last.phase != "failed":
                self.reports[name] = report
                now = time.monotonic()
                if report.phase == "compiling" or (last is not None and last.phase == "compiling"):
                    self._compiling[name] = self._compiling.get(name, (now, now))[0], now
                if report.phase == "ready":
                    self._ready.setdefault(name, now)
            self._on_report(name, report)

    def slowest(self, names: Iterable[str]) -> str:
        """Names the process among ``names`` that was ready last, and its host."""
        _, name = max((self._ready[name], name) for name in names)
        return f"slowest: {name} on {self.reports[name].host}"

    def seconds_compiling(self, names: Iterable[str]) -> float:
        """The longest time that any of ``names`` has compiled or waited for a compiler."""
        spans = [self._compiling[name] for name in names if name in self._compiling]
        return max((end - begin for begin, end in spans), default=0.0)

    def wait(
        self, names: Iterable[str], deadline: float, done: Callable[[Report], bool] | None = None
    ) -> None:
        """Waits until every process in ``names`` is ready, or ``done`` accepts its report.

        Raises LaunchError when one fails, when any process of the cluster ends, or after
        ``deadline`` seconds.
        """
        finished = done or (lambda report: report.phase == "ready")
        missing = set(names)
        end = time.monotonic() + deadline
        while missing:
            self._interrupts.check()
            self.read(_POLL)
            self.check()
            reports = self.reports
            missing = {name for name in missing if name not in reports or not finished(reports[name])}
            if missing and time.monotonic() > end:
                waiting = ", ".join(self._progress(name) for name in sorted(missing))
                room = self._cluster.waiting()
                hint = f"; {room}" if room else ""
                raise LaunchError(f"not ready after {deadline:g} s: {waiting}{hint}")

    def check(self) -> None:
        """Raises LaunchError when a process has failed or ended.

        Names the first failure reported: it caused the others.
        """
        failed = [name for name, report in self.reports.items() if report.phase == "failed"]
        deaths = [] if failed else self.deaths()
        if failed:
            report = self.reports[failed[0]]
            raise LaunchError(f"{failed[0]} on {report.host} (pid {report.pid}) failed: {report.detail}")
        if deaths:
            raise LaunchError(self.causes(deaths)[0][0])

    def deaths(self, *, stopping: bool = False) -> list[Death]:
        """Processes that have ended since the last call, those killed by a signal first.

        After a death waits briefly for its last report and for the deaths it causes: killed
        processes usually take the others down. ``stopping``: all processes were asked to end, so a
        clean exit is no cause.
        """
        found = self._cluster.deaths()
        if any(death.code != 0 for death in found) if stopping else found:
            self.read(_LAST_REPORT_SECONDS)
            found += self._cluster.deaths()
        return sorted(found, key=lambda death: death.code is not None and death.code >= 0)

    def forget(self, name: str) -> None:
        """Drops the reports of a process that is replaced, including late ones."""
        self._ready.pop(name, None)
        report = self.reports.pop(name, None)
        if report is not None:
            self._gone.add((report.host, report.pid))

    def ready(self) -> set[str]:
        """The names of all processes that are ready."""
        return {name for name, report in self.reports.items() if report.phase == "ready"}

    def kill_expected(self, place: Place, why: str) -> bool:
        """Notes that the launcher kills the process at ``place``. Returns False if it was noted
        before.
        """
        key = place.host, place.pid
        new = key not in self._killed
        self._killed.setdefault(key, why)
        return new

    def causes(self, deaths: list[Death]) -> list[tuple[str, list[Death]]]:
        """One line per cause, with its deaths: processes lost together share a line."""
        by_cause: dict[str, list[Death]] = {}
        for death in deaths:
            by_cause.setdefault(death.lost_with or death.task.name, []).append(death)
        return [
            (_lost_with(group) if group[0].lost_with else self.cause(group[0]), group)
            for group in by_cause.values()
        ]

    def cause(self, death: Death) -> str:
        """One line: the process, its host, how it ended and why."""
        report = self.reports.get(death.task.name)
        process = f"{death.task.name} on {death.place.host} (pid {death.place.pid})"
        if report is not None and report.phase == "failed":
            return f"{process} failed: {report.detail}"
        if why := self._killed.get((death.place.host, death.place.pid)):
            return f"{process} was killed by the launcher: it {why}"
        starting = report is not None and report.phase not in ("ready", "stopped")
        phase = f" while {report.phase}" if report is not None and starting else ""
        last = f"; its last line: {death.last_line}" if death.last_line and not death.killed else ""
        return f"{process} {death.cause}{phase}{last}"

    def _progress(self, name: str) -> str:
        report = self.reports.get(name)
        if report is None:
            return f"{name} (has not reported)"
        progress = f" {report.fraction:.0%}" if report.phase == "loading" else ""
        return f"{name} ({report.phase}{progress})"


def _lost_with(deaths: list[Death]) -> str:
    names = ", ".join(sorted((death.task.name for death in deaths), key=lambda name: (len(name), name)))
    return f"{deaths[0].lost_with} was lost, and with it {names}"
