"""A client of a server that a test ends or breaks: a stream read in a thread, and whether new
requests are refused.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import httpx
import openai

_LONG: dict[str, Any] = {
    "model": "demo",
    "temperature": 0.0,
    "stream": True,
    "extra_body": {"ignore_eos": True},
}


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60.0)


def cluster_of(url: str, admin_key: str) -> dict[str, Any]:
    """The state of the cluster, as ``/admin/cluster`` shows it."""
    headers = {"Authorization": f"Bearer {admin_key}"}
    answer = httpx.get(f"{url.removesuffix('/v1')}/admin/cluster", headers=headers)
    state: dict[str, Any] = answer.json()
    return state


def refused(url: str) -> bool:
    """Whether a new request is."""
    with client(url) as late:
        try:
            late.completions.create(model="demo", prompt="too late", max_tokens=1)
        except (openai.InternalServerError, openai.APIConnectionError):
            return True
    return False


class Reader(threading.Thread):
    """Reads a stream of ``max_tokens`` in a thread. ``started`` is set with its first chunk;
    ``finish`` is how the server ended it, ``error`` what cut it off, ``gap`` the longest time in
    seconds between two chunks.
    """

    def __init__(self, url: str, max_tokens: int, prompt: str = "Hello") -> None:
        super().__init__(daemon=True)
        self._url, self._max_tokens, self.prompt = url, max_tokens, prompt
        self.started = threading.Event()
        self.chunks = 0
        self.text = ""
        self.finish: str | None = None
        self.error: Exception | None = None
        self.gap = 0.0

    def run(self) -> None:
        try:
            with (
                client(self._url) as made,
                made.completions.create(prompt=self.prompt, max_tokens=self._max_tokens, **_LONG) as stream,
            ):
                last = time.monotonic()
                for chunk in stream:
                    self.chunks += 1
                    self.gap, last = max(self.gap, time.monotonic() - last), time.monotonic()
                    self.text += chunk.choices[0].text
                    self.finish = chunk.choices[0].finish_reason or self.finish
                    self.started.set()
        except Exception as error:
            self.error = error

    def flowing(self) -> Reader:
        """Starts it; this one, when its first chunk is here."""
        self.start()
        assert self.started.wait(60), self.error
        return self
