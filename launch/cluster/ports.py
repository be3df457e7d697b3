"""The address of the server: binding its port, and its URLs."""

from __future__ import annotations

import socket

from .cluster import LaunchError


def bound_socket(host: str, port: int) -> socket.socket:
    """A bound TCP socket for the server; port 0 lets the kernel choose. Raises LaunchError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise LaunchError(
            f"frontend.host = {host}, frontend.port = {port}: cannot be listened on: {error.strerror}"
        ) from None
    return bound


def check_port(host: str, port: int) -> None:
    """Raises LaunchError when the server could not listen there. Keeps nothing open."""
    bound_socket(host, port).close()


def reachable(host: str) -> str:
    """The address at which this machine reaches a server that listens on ``host``."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)


def base_url(host: str, port: int) -> str:
    """The URL by which this machine reaches a server that listens on ``host``."""
    name = reachable(host)
    return f"http://{f'[{name}]' if ':' in name else name}:{port}"


def url_elsewhere(host: str, port: int) -> str | None:
    """The URL for other hosts of a server that listens on every interface, else None."""
    return None if reachable(host) == host else f"http://{socket.gethostname()}:{port}"
