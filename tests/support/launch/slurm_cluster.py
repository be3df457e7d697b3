"""Slurm on hosts made of namespaces: the controller on one, ``slurmd`` on each other.

Daemons, sockets, keys and state are this cluster's own, in one folder; everything ends with the
hosts. Debian's Slurm (22.05) looks for folders of version 1 control groups even where nothing uses
them, so each host gets empty ones on a tmpfs; the machine's own groups are not touched.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest

from .clusters import until
from .hosts import Host, make_hosts, missing
from .launcher import alive, command_of

_TOOLS = {"slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "sbatch": "slurm-wlm", "munged": "munge"}
_GROUPS = ("freezer", "memory", "cpuset", "devices", "cpuacct", "systemd")
_DAEMONS = ("slurmd", "slurmctld", "slurmscriptd", "munged")
_CONF = """
ClusterName=hosts
SlurmctldHost={controller}({address})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0
KillWait=60
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=1:00:00
"""


class SlurmCluster:
    """``hosts``: the nodes. ``work``: a folder that all share, for scripts and logs. ``own``: an
    empty folder on each.
    """

    def __init__(self, controller: Host, hosts: list[Host], folder: Path) -> None:
        self.hosts = hosts
        self.work, self.own = folder / "work", folder / "own"
        self._controller = controller
        self._folder = folder
        self._environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def up(self) -> None:
        """Writes the configuration, starts the daemons, and waits until every node is idle."""
        nodes = "\n".join(
            f"NodeName={host.name} NodeAddr={host.address} CPUs=4 RealMemory=4000" for host in self.hosts
        )
        settings = {
            "controller": self._controller.name,
            "address": self._controller.address,
            "folder": self._folder,
            "nodes": nodes,
        }
        (self._folder / "slurm.conf").write_text(_CONF.format(**settings))
        (self._folder / "cgroup.conf").write_text(
            "CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\nIgnoreSystemd=yes\n"
        )
        key = self._folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o600)
        for name in ("state", *(f"spool-{host.name}" for host in self.hosts)):
            (self._folder / name).mkdir()
        names = ("key-file", "socket", "pid-file", "log-file", "seed-file")
        files = [f"--{name}={self._folder}/munge.{name.removesuffix('-file')}" for name in names]
        self._daemon(self._controller, "munged", "--foreground", "--force", *files)
        until(lambda: (self._folder / "munge.socket").exists(), "munged")
        self._daemon(self._controller, "slurmctld", "-D", "-f", self._environment["SLURM_CONF"])
        for host in self.hosts:
            host.run("mount", "-t", "tmpfs", "tmpfs", "/sys/fs/cgroup")
            host.run("mkdir", *(f"/sys/fs/cgroup/{name}" for name in _GROUPS))
            self._daemon(host, "slurmd", "-D", "-N", host.name, "-f", self._environment["SLURM_CONF"])
        try:
            until(lambda: self._states() == {"idle"}, "every node to be idle", 30.0)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from None

    def _daemon(self, host: Host, *command: str) -> None:
        with (self._folder / f"{command[0]}-{host.name}.out").open("ab") as output:
            environment = os.environ | self._environment
            self._daemons.append(
                host.popen(*command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
            )

    def down(self) -> None:
        """Waits for the daemons, which end with their hosts."""
        for daemon in self._daemons:
            daemon.wait(20.0)

    def _states(self) -> set[str]:
        log = self._folder / "slurmctld.log"
        if not log.exists() or "Running as primary controller" not in log.read_text():
            return set()
        return set(self.command("sinfo", "--noheader", "--Node", "--format=%t").split())

    def logs(self) -> str:
        """The daemons' logs, to explain a failure."""
        return "\n".join(
            f"--- {path.name}\n{path.read_text()[-2000:]}" for path in sorted(self._folder.glob("slurm*.log"))
        )

    # ------------------------------------------------------------------ jobs

    def command(self, *arguments: str) -> str:
        """A Slurm command as a user types it on the login node, in ``work``."""
        return self._controller.run(
            "env", "--chdir", str(self.work), *arguments, environment=self._environment
        )

    def submit(self, script: str, *options: str) -> Job:
        path = self.work / f"job-{secrets.token_hex(4)}.sh"
        path.write_text(script)
        return Job(self, int(self.command("sbatch", "--parsable", *options, str(path))))

    def left(self, but: Sequence[str] = _DAEMONS) -> list[str]:
        """Processes on the nodes other than Slurm's daemons, and files in their shared memory and
        own folders.
        """
        found = []
        for host in self.hosts:
            for process in filter(alive, host.processes()):
                with contextlib.suppress(psutil.NoSuchProcess):  # it has ended since
                    if process.name() not in but:
                        found.append(f"{host.name}: {' '.join(command_of(process))}")
            found += [
                f"{host.name}: {name}"
                for name in host.run("find", "/dev/shm", str(self.own), "-mindepth", "1").split()
            ]
        return found


class Job:
    """A job by its number."""

    def __init__(self, cluster: SlurmCluster, number: int) -> None:
        self.cluster, self.number = cluster, number

    @property
    def folder(self) -> Path:
        return self.cluster.work / f"lockstep-{self.number}"

    @property
    def output(self) -> str:
        path = self.cluster.work / f"lockstep-{self.number}.out"
        return path.read_text() if path.exists() else ""

    def facts(self) -> dict[str, str]:
        """The output of ``scontrol show job``."""
        return dict(
            re.findall(r"(\w+)=(\S*)", self.cluster.command("scontrol", "show", "job", str(self.number)))
        )

    def url(self, seconds: float = 90.0) -> str:
        """Waits for the ready line; returns the address in the job's folder."""
        deadline = time.monotonic() + seconds
        while "\nready: " not in self.output:
            assert self.facts()["JobState"] in ("PENDING", "CONFIGURING", "RUNNING"), (
                f"{self.facts()}\n{self.output}"
            )
            assert time.monotonic() < deadline, f"not ready in {seconds:g} s: {self.facts()}\n{self.output}"
            time.sleep(0.3)
        return (self.folder / "endpoint").read_text().strip()

    def wait(self, seconds: float = 60.0) -> tuple[str, int]:
        """State and exit code when the job has ended on all its nodes."""
        deadline = time.monotonic() + seconds
        while (facts := self.facts())["JobState"] in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
            assert time.monotonic() < deadline, (
                f"still {facts['JobState']} after {seconds:g} s\n{self.output}\n{self.cluster.logs()}"
            )
            time.sleep(0.2)
        return facts["JobState"], int(facts["ExitCode"].partition(":")[0])


@contextmanager
def slurm_cluster(*names: str) -> Iterator[SlurmCluster]:
    """Slurm with a node of every name, ready for jobs."""
    with ExitStack() as stack:
        folder = Path(
            stack.enter_context(TemporaryDirectory(prefix="slurm-", dir="/tmp", ignore_cleanup_errors=True))
        )
        folder.chmod(0o755)
        for name in ("work", "own"):
            (folder / name).mkdir()
        daemons = stack.enter_context(ExitStack())  # left after the hosts
        controller, *hosts = stack.enter_context(make_hosts("login", *names, private=[folder / "own"]))
        cluster = SlurmCluster(controller, hosts, folder)
        daemons.callback(cluster.down)
        cluster.up()
        yield cluster


@functools.cache
def missing_slurm() -> str:
    """The reason why Slurm cannot run on hosts of this machine; empty if it can."""
    if absent := sorted({package for tool, package in _TOOLS.items() if shutil.which(tool) is None}):
        return f"runs a Slurm of its own, which takes the packages {' and '.join(absent)} (apt-get install)"
    return missing()


needs_slurm = [
    pytest.mark.slurm,
    pytest.mark.hosts,
    pytest.mark.skipif(bool(missing_slurm()), reason=missing_slurm()),
]
