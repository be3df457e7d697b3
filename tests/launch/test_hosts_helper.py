"""The hosts that other tests run on: separate, connected, and gone without a trace."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from support.launch.clusters import until
from support.launch.hosts import Host, inner, make_hosts, needs_hosts

pytestmark = [*needs_hosts]

ANSWER = """
import socket
server = socket.create_server(("0.0.0.0", 7000))
print("on", flush=True)
server.accept()[0].sendall(socket.gethostname().encode())
"""
ASK = "import socket, sys; print(socket.create_connection((sys.argv[1], 7000), 5).recv(99).decode())"


def ask(host: Host, of: str) -> str:
    return host.run(sys.executable, "-c", ASK, of).strip()


def answers(address: str) -> bool:
    """Whether a host at the address answers, if only to refuse."""
    try:
        socket.create_connection((address, 7000), 1).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return True


def serve(host: Host) -> subprocess.Popen[bytes]:
    process = host.popen(sys.executable, "-c", ANSWER, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"on\n"
    return process


def test_hosts_have_names_addresses_and_folders_of_their_own(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    with make_hosts("alpha", "beta", private=[own], shm="8m") as (alpha, beta):
        assert [host.run("hostname").strip() for host in (alpha, beta)] == ["alpha", "beta"]
        alpha.run("touch", str(own / "file"), str(tmp_path / "shared"), "/dev/shm/file")
        assert [beta.run("ls", folder).split() for folder in (str(own), "/dev/shm", str(tmp_path))] == [
            [],
            [],
            ["own", "shared"],
        ]
        assert "8.0M" in beta.run("df", "-h", "/dev/shm")
        assert beta.run("ls", "/sys/class/net").split() == ["eth0", "lo"]
        assert socket.gethostname() not in ("alpha", "beta")
        assert alpha.address != beta.address
        assert list(own.iterdir()) == []


def test_they_reach_each_other_by_name_and_this_machine_reaches_them() -> None:
    with make_hosts("alpha", "beta") as (alpha, beta):
        with serve(alpha), serve(beta):
            assert ask(alpha, "beta") == "beta"  # equal ports on different hosts
            with socket.create_connection((alpha.address, 7000), 5) as line:
                assert line.recv(99) == b"alpha"
        with serve(beta):
            until(lambda: bool(beta.processes()), "its process")
            beta.down()
            until(lambda: not os.path.exists(f"/proc/{beta.pid}"), "the end of the host")
        until(lambda: not answers(beta.address), "the end of its network")


def test_a_command_can_be_found_and_signalled() -> None:
    with make_hosts("alpha") as (alpha,):
        process = alpha.popen("sleep", "60")
        command = inner(process)
        until(lambda: command.name() == "sleep", "the command")
        assert command in alpha.processes()
        command.terminate()
        assert process.wait(60) != 0


@pytest.mark.parametrize("how", ["leave", "raise", "kill"])
def test_nothing_is_left_however_it_ends(how: str, tmp_path: Path) -> None:
    code = f"""
import os, sys
from support.launch.hosts import make_hosts
with make_hosts("alpha", "beta") as (alpha, beta):
    alpha.popen("sh", "-c", "(setsid sleep 600 &) ; sleep 600")
    print(alpha.pid, beta.pid, flush=True)
    sys.stdin.read()
    if {how!r} == "raise":
        raise RuntimeError
"""
    before = set(psutil.net_if_addrs())
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "TMPDIR": str(tmp_path)},
    )
    assert process.stdout is not None
    namespaces = {os.readlink(f"/proc/{pid}/ns/net") for pid in process.stdout.readline().split()}
    assert len(namespaces) == 2
    if how == "kill":
        process.kill()
    process.communicate()

    def users() -> list[int]:
        found = []
        for each in psutil.process_iter():
            try:
                if os.readlink(f"/proc/{each.pid}/ns/net") in namespaces:
                    found.append(each.pid)
            except OSError:
                pass
        return found

    until(lambda: not users(), "the processes on the hosts to end")
    deadline = time.monotonic() + 10
    while extra := set(psutil.net_if_addrs()) - before:
        assert time.monotonic() < deadline, extra
        time.sleep(0.05)
