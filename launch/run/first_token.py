"""Asks the front door for one token before the cluster is called ready."""

from __future__ import annotations

import http.client
import json
import threading
import time

from ..cluster.cluster import LaunchError

_RETRY = 0.05


class FirstToken:
    """Asks ``GET /health/generate`` for one real token, in a thread, so that the launcher can watch
    its processes meanwhile.

    A 503 is asked again until ``deadline`` seconds have passed: the frontend may not have heard yet
    that all ranks are there.
    """

    def __init__(self, host: str, port: int, api_key: str | None, deadline: float) -> None:
        self._host, self._port, self._end = host, port, time.monotonic() + deadline
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._problem: str | None = None
        self._thread = threading.Thread(target=self._insist, name="first-token", daemon=True)
        self._thread.start()

    def done(self, timeout: float) -> bool:
        """Whether the token has come, after waiting up to ``timeout`` seconds. Raises LaunchError
        where it will not.
        """
        self._thread.join(timeout)
        if self._thread.is_alive():
            return False
        if self._problem is not None:
            raise LaunchError(
                f"the server does not answer GET /health/generate with a token: {self._problem}"
            )
        return True

    def _insist(self) -> None:
        while (status := self._ask()) == 503 and time.monotonic() < self._end:
            time.sleep(_RETRY)
        if status == 200:
            self._problem = None

    def _ask(self) -> int | None:
        """The status of one attempt, None where there was no answer; ``_problem`` says what was
        wrong with it.
        """
        connection = http.client.HTTPConnection(
            self._host, self._port, timeout=max(1.0, self._end - time.monotonic())
        )
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
