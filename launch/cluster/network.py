"""Network interfaces of this machine, by their addresses. Linux only."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from pathlib import Path

_SIOCGIFADDR = 0x8915  # linux/sockios.h
_IPV6_TABLE = Path("/proc/net/if_inet6")  # address, index, prefix length, scope, flags, name


def interface_of(address: str) -> str | None:
    """The interface that has ``address`` (IPv4 or IPv6), or None."""
    wanted = ipaddress.ip_address(address)
    if wanted.is_loopback:
        return "lo"
    if wanted.version == 6:
        rows = [line.split() for line in _IPV6_TABLE.read_text().splitlines()] if _IPV6_TABLE.exists() else []
        return next((row[-1] for row in rows if row[0] == f"{int(wanted):032x}"), None)
    return next((name for _, name in socket.if_nameindex() if _ipv4(name) == str(wanted)), None)


def _ipv4(interface: str) -> str | None:
    """The first IPv4 address of an interface."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            return None
    return socket.inet_ntoa(answer[20:24])
