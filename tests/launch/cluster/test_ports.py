"""The URLs of a server by the address it listens on."""

from __future__ import annotations

import socket

import pytest

from lockstep.launch.cluster.cluster import LaunchError
from lockstep.launch.cluster.ports import base_url, check_port, url_elsewhere


def test_a_server_on_every_interface_is_reached_on_this_machine() -> None:
    urls = {host: base_url(host, 80) for host in ("0.0.0.0", "::", "10.0.0.7")}
    assert urls == {
        "0.0.0.0": "http://127.0.0.1:80",
        "::": "http://[::1]:80",
        "10.0.0.7": "http://10.0.0.7:80",
    }


def test_others_reach_a_server_on_every_interface_by_the_name_of_its_host() -> None:
    name = socket.gethostname()
    urls = {host: url_elsewhere(host, 80) for host in ("0.0.0.0", "::", "10.0.0.7", "127.0.0.1")}
    assert urls == {
        "0.0.0.0": f"http://{name}:80",
        "::": f"http://{name}:80",
        "10.0.0.7": None,
        "127.0.0.1": None,
    }


def test_a_taken_port_and_a_foreign_host_are_refused_and_a_free_port_is_not_kept() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            LaunchError, match=f"frontend.port = {port}: cannot be listened on: Address already in use"
        ):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)
    socket.create_server(("127.0.0.1", port)).close()
    with pytest.raises(LaunchError, match=r"frontend.host = 192.0.2.1"):
        check_port("192.0.2.1", 0)
