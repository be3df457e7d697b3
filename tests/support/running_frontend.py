"""A real frontend (``server.main`` in a thread, real sockets) against a ``ScriptedController``."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path
from types import TracebackType

import httpx

from lockstep.engine.frontend.server import main
from lockstep.engine.specs import FrontendSpec

from .scripted_controller import Script, ScriptedController
from .tiny_tokenizer import VOCAB_SIZE

MODEL = "tiny"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(condition: object, what: str, seconds: float = 10.0) -> None:
    """Polls ``condition()`` until it holds; says what did not happen."""
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"within {seconds} s not: {what}"
        time.sleep(0.005)


class RunningFrontend:
    """Use as a context manager. ``http`` is a client of the server; ``engine`` the mock controller behind it."""

    def __init__(self, model_path: Path, script: Script, **spec: object) -> None:
        self.engine = ScriptedController(script)
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.spec = FrontendSpec(
            name="frontend0",
            keys=self.engine.keys,
            address=self.engine.address,
            model_path=str(model_path),
            served_name=MODEL,
            vocab_size=VOCAB_SIZE,
            host="127.0.0.1",
            port=port,
            **spec,  # type: ignore[arg-type]
        )
        self.http = httpx.Client(base_url=self.url, timeout=20)
        self._thread = threading.Thread(target=main, args=(self.spec,), name="frontend", daemon=True)

    def __enter__(self) -> RunningFrontend:
        self.start()
        wait_until(self._is_up, "the frontend answers /health with 200")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self.http.close()
        self.engine.stop()
        self._thread.join(15)
        self.engine.close()
        assert not self._thread.is_alive(), "the frontend did not leave within 15 s of Stop"

    def _is_up(self) -> bool:
        assert self._thread.is_alive(), "the frontend ended while starting"
        try:
            return self.http.get("/health").status_code == 200
        except httpx.ConnectError:
            return False
