"""Asks the server for one token before the cluster is reported ready."""

from __future__ import annotations

import http.client
import json
import threading
import time

from ..cluster.cluster import LaunchError

_RETRY = 0.05


class FirstToken:
    """Requests ``GET /health/generate`` in a thread, while the launcher watches its processes.

    Retries a 503 for ``deadline`` seconds: the frontend may not know yet that all ranks are ready.
    """

    def __init__(self, host: str, port: int, api_key: str | None, deadline: float) -> None:
        self._host = host
        self._port = port
        self._end = time.monotonic() + deadline
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._problem: str | None = None
        self._thread = threading.Thread(target=self._insist, name="first-token", daemon=True)
        self._thread.start()

    def done(self, timeout: float) -> bool:
        """Waits up to ``timeout`` seconds; returns whether the token has come.

        Raises LaunchError when it will not come.
        """
        self._thread.join(timeout)
        if self._thread.is_alive():
            return False
        if self._problem is not None:
            text = f"the server does not answer GET /health/generate with a token: {self._problem}"
            raise LaunchError(text)
        return True

    def _insist(self) -> None:
        while (status := self._ask()) == 503 and time.monotonic() < self._end:
            time.sleep(_RETRY)
        if status == 200:
            self._problem = None

    def _ask(self) -> int | None:
        """One attempt: sets ``_problem`` and returns the status, None without an answer."""
        timeout = max(1.0, self._end - time.monotonic())
        connection = http.client.HTTPConnection(self._host, self._port, timeout=timeout)
        try:
            connection.request("GET", "/health/generate", headers=self._headers)
            response = connection.getresponse()
            self._problem = f"HTTP {response.status}: {_message(response.read())}"
            return response.status
        except (OSError, http.client.HTTPException) as error:
            self._problem = f"{type(error).__name__}: {error}"
            return None
        finally:
            connection.close()


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")[:200]
