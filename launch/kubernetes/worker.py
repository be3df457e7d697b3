"""Two steps of a pod that is not the leader: it waits for the leader's Ray before it joins, and it
outlives a leader that drains.

Usage: ``python -m lockstep.launch.kubernetes.worker wait|outlast HOST:PORT --seconds N``. Exit
status 1 if ``wait`` finds no leader in time.
"""

from __future__ import annotations

import argparse
import http.client
import socket
import sys
import time

from .deployment import LEAVING_SECONDS

_TRY_SECONDS = 3.0
_PAUSE = 0.5


def wait(host: str, port: int, seconds: float) -> int:
    """Returns 0 as soon as the leader's Ray can be connected to."""
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), _TRY_SECONDS).close()
            return 0
        except OSError as error:
            if time.monotonic() > end:
                text = f"error: Ray of the leader, {host}:{port}, cannot be reached after {seconds:g} s"
                print(f"{text}: {error}", file=sys.stderr)
                return 1
        time.sleep(_PAUSE)


def outlast(host: str, port: int, seconds: float, delay: float = LEAVING_SECONDS + 1.0) -> int:
    """Waits for the leader to end, then returns 0. Returns at once if the leader keeps serving:
    then only this pod stops, and its ranks are replaced elsewhere. The leader begins to drain
    within ``delay`` seconds.
    """
    end = time.monotonic() + seconds
    time.sleep(delay)
    while time.monotonic() < end and _status(host, port) == 503:
        time.sleep(_PAUSE)
    return 0


def _status(host: str, port: int) -> int:
    """The leader's answer to /ready: 503 while it drains; 0 for none."""
    connection = http.client.HTTPConnection(host, port, timeout=_TRY_SECONDS)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


def main() -> int:
    parser = argparse.ArgumentParser(prog="lockstep.launch.kubernetes.worker", description=__doc__)
    parser.add_argument("step", choices=("wait", "outlast"))
    parser.add_argument("address", metavar="HOST:PORT")
    parser.add_argument("--seconds", type=float, required=True)
    given = parser.parse_args()
    host, _, port = given.address.rpartition(":")
    step = wait if given.step == "wait" else outlast
    return step(host, int(port), given.seconds)


if __name__ == "__main__":
    sys.exit(main())
