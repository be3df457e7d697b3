"""Several hosts on one machine: each a set of namespaces with its own name, address and processes.

A host has its own network (``eth0`` on a switch that joins all hosts and this machine), host name,
process ids, ``/dev/shm`` and ``/etc/hosts``, which names all hosts. Files are shared, except for
the folders in ``private``. A host lives as long as the first process of its namespace, which ends
when this process closes its pipe or dies: the kernel then kills everything on the host and removes
its network, so that nothing stays behind. Needs root, iproute2 and util-linux.
"""

from __future__ import annotations

import functools
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

# The first process of a namespace: orphans are its children, and are reaped by the kernel because
# it ignores their end.
_INIT = """
import signal, sys
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print("up", flush=True)
sys.stdin.read()
"""
_TOOLS = ("ip", "unshare", "nsenter", "mount")
_ISOLATED = ("--net", "--uts", "--mount", "--ipc", "--pid")
_SECONDS = 20.0


@dataclass(frozen=True)
class Host:
    """A host. ``pid``: its first process, as this machine numbers it. ``machine``: this machine's
    address on the switch.
    """

    name: str
    address: str
    machine: str
    pid: int

    def command(self, *arguments: str, folder: Path | None = None) -> list[str]:
        """The command line that runs ``arguments`` here, in ``folder`` or the current one."""
        return [
            "nsenter",
            "--target",
            str(self.pid),
            *_ISOLATED,
            f"--wdns={folder or Path.cwd()}",
            "--",
            *arguments,
        ]

    def run(
        self, *arguments: str, seconds: float = _SECONDS, environment: Mapping[str, str] | None = None
    ) -> str:
        """Runs a command and returns its output. Asserts that it succeeds."""
        done = subprocess.run(
            self.command(*arguments),
            capture_output=True,
            text=True,
            timeout=seconds,
            env=os.environ | (environment or {}),
            check=False,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, (
            f"{self.name}: {' '.join(arguments)}: status {done.returncode}\n{done.stdout}{done.stderr}"
        )
        return done.stdout

    def popen(self, *arguments: str, **options: Any) -> subprocess.Popen[Any]:
        """Starts a command under nsenter, whose Popen is returned; ``inner`` finds the command."""
        return subprocess.Popen(self.command(*arguments), **options)

    def processes(self) -> list[psutil.Process]:
        """The host's processes except its first, by this machine's ids; empty once it is down."""
        found: list[psutil.Process] = []
        try:
            namespace = os.readlink(f"/proc/{self.pid}/ns/pid")
        except FileNotFoundError:
            return found  # it is down
        for process in psutil.process_iter():
            try:
                if os.readlink(f"/proc/{process.pid}/ns/pid") == namespace and process.pid != self.pid:
                    found.append(process)
            except OSError:
                pass
        return found

    def down(self) -> None:
        """Ends the host as a power failure does: every process at once, and its network."""
        psutil.Process(self.pid).kill()


def inner(process: subprocess.Popen[Any], seconds: float = _SECONDS) -> psutil.Process:
    """The command that nsenter runs, by this machine's process id."""
    deadline = time.monotonic() + seconds
    while not (children := psutil.Process(process.pid).children()):
        assert process.poll() is None, f"{process.args!r} left with {process.returncode}"
        assert time.monotonic() < deadline, f"{process.args!r} started nothing in {seconds:g} s"
        time.sleep(0.01)
    return children[0]


@contextmanager
def make_hosts(*names: str, private: Sequence[Path] = (), shm: str = "1g") -> Iterator[list[Host]]:
    """Makes hosts that reach each other and this machine, by address and by name.

    Each has an empty folder of its own in place of every folder in ``private`` (which must exist),
    and a ``/dev/shm`` of size ``shm``.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hosts-")))
        switch = stack.enter_context(_namespace("--net", "--pid"))
        network = _free_network()
        machine, addresses = f"{network}.1", [f"{network}.{2 + index}" for index in range(len(names))]
        _in_network(switch, "ip", "link", "add", "switch", "type", "bridge")
        _in_network(switch, "ip", "link", "set", "switch", "up")
        uplink = f"up{switch}"
        stack.callback(subprocess.run, ["ip", "link", "delete", uplink], capture_output=True, check=False)
        _plug(switch, "uplink", uplink, None)
        _bring_up(None, uplink, machine)
        table = folder / "hosts"
        lines = [f"{address} {name}" for address, name in zip(addresses, names, strict=True)]
        table.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        made = []
        for index, (name, address) in enumerate(zip(names, addresses, strict=True)):
            pid = stack.enter_context(_namespace(*_ISOLATED, "--mount-proc"))
            made.append(Host(name, address, machine, pid))
            _plug(switch, f"port{index}", "eth0", pid)
            _bring_up(pid, "eth0", address)
            _furnish(made[-1], table, private, shm)
        yield made


def _furnish(host: Host, table: Path, private: Sequence[Path], shm: str) -> None:
    host.run("hostname", host.name)
    host.run("ip", "link", "set", "lo", "up")
    host.run("mount", "--bind", str(table), "/etc/hosts")
    host.run("mount", "-t", "sysfs", "sysfs", "/sys")  # so that /sys/class/net shows this network
    host.run("mount", "-t", "tmpfs", "-o", f"size={shm}", "tmpfs", "/dev/shm")
    for folder in private:
        host.run("mount", "-t", "tmpfs", "tmpfs", str(folder))


@contextmanager
def _namespace(*kinds: str) -> Iterator[int]:
    """New namespaces until the context or this process ends; yields their first process."""
    command = ["unshare", *kinds, "--fork", "--kill-child", "--", sys.executable, "-I", "-S", "-c", _INIT]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, cwd="/"
    )
    try:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == b"up\n", f"{command} did not come up"
        yield psutil.Process(process.pid).children()[0].pid
    finally:
        process.communicate(timeout=_SECONDS)


def _in_network(pid: int | None, *arguments: str) -> None:
    enter = () if pid is None else ("nsenter", "--target", str(pid), "--net", "--")
    done = subprocess.run([*enter, *arguments], capture_output=True, text=True, timeout=_SECONDS, check=False)
    assert done.returncode == 0, f"{' '.join(arguments)}: {done.stderr}"


def _plug(switch: int, port: str, name: str, pid: int | None) -> None:
    """Connects a port of the switch to the interface ``name`` of a host, or of this machine."""
    where = () if pid is None else ("netns", str(pid))
    _in_network(
        None, "ip", "link", "add", name, *where, "type", "veth", "peer", "name", port, "netns", str(switch)
    )
    _in_network(switch, "ip", "link", "set", port, "master", "switch", "up")


def _bring_up(pid: int | None, name: str, address: str) -> None:
    _in_network(pid, "ip", "address", "add", f"{address}/24", "dev", name)
    _in_network(pid, "ip", "link", "set", name, "up")


def _free_network() -> str:
    """The first three numbers of a network that no interface of this machine is in."""
    addresses = [entry.address for entries in psutil.net_if_addrs().values() for entry in entries]
    used = {address.rpartition(".")[0] for address in addresses}
    return random.choice([name for name in (f"10.213.{third}" for third in range(256)) if name not in used])


@functools.cache
def missing() -> str:
    """The reason why this machine cannot make hosts; empty if it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "makes network namespaces, which takes root on Linux"
    if absent := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        return f"makes network namespaces, which takes {', '.join(absent)} (iproute2, util-linux)"
    tried = subprocess.run(
        ["unshare", *_ISOLATED, "--fork", "true"],
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=False,
    )
    return f"cannot make namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


needs_hosts = [pytest.mark.hosts, pytest.mark.skipif(bool(missing()), reason=missing())]
