"""The sockets on which processes listen.

``python -m support.launch.open_sockets`` prints those of a host as lines of JSON.
"""

from __future__ import annotations

import ipaddress
import json
import socket
import sys
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path

import psutil

from .hosts import Host


@dataclass(frozen=True)
class OpenSocket:
    """A TCP socket that listens, or a UDP socket that receives."""

    kind: str
    address: str
    port: int
    command: str

    @property
    def on_loopback(self) -> bool:
        address = ipaddress.ip_address(self.address)
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def open_sockets(processes: Iterable[psutil.Process]) -> set[OpenSocket]:
    """The open sockets of processes; those that have ended meanwhile have none."""
    found = set()
    for process in processes:
        try:
            command = " ".join(process.cmdline())
            for entry in process.net_connections("inet"):
                listens = entry.status == psutil.CONN_LISTEN
                receives = entry.type == socket.SOCK_DGRAM and not entry.raddr
                if listens or receives:
                    kind = "tcp" if listens else "udp"
                    found.add(OpenSocket(kind, entry.laddr.ip, entry.laddr.port, command))
        except psutil.NoSuchProcess:
            continue
    return found


def sockets_of(host: Host) -> list[OpenSocket]:
    """The open sockets of all processes of a host."""
    path = {"PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    lines = host.run(sys.executable, "-m", "support.launch.open_sockets", environment=path).splitlines()
    return [OpenSocket(*json.loads(line)) for line in lines]


if __name__ == "__main__":
    for found in open_sockets(psutil.process_iter()):
        print(json.dumps(astuple(found)))
