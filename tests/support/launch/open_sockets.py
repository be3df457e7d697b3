"""The sockets on which processes listen.

``python -m support.launch.open_sockets`` prints those of a host: address, port, kind and command.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from dataclasses import dataclass

import psutil


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
            command = " ".join(process.cmdline())[-80:]
            for entry in process.net_connections("inet"):
                listens = entry.status == psutil.CONN_LISTEN
                receives = entry.type == socket.SOCK_DGRAM and not entry.raddr
                if listens or receives:
                    kind = "tcp" if listens else "udp"
                    found.add(OpenSocket(kind, entry.laddr.ip, entry.laddr.port, command))
        except psutil.NoSuchProcess:
            continue
    return found


if __name__ == "__main__":
    for found in sorted(open_sockets(psutil.process_iter()), key=str):
        print(found.address, found.port, found.kind, found.command)
