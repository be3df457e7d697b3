"""A real frontend (``server.main`` in a thread, real sockets) against a ``ScriptedController``."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType

import httpx

from lockstep.engine.frontend.process import main
from lockstep.engine.protocol.specs import FrontendSpec
from lockstep.launch.run.acceptor import Acceptor

from ..text.tiny_tokenizer import VOCAB_SIZE
from .scripted_controller import Script, ScriptedController

MODEL = "tiny"


def wait_until(condition: object, what: str, seconds: float = 30.0) -> None:
    """Polls ``condition()`` until it holds; says what did not happen."""
    assert callable(condition)
    deadline = (
        time.monotonic() + seconds
    )  # what is awaited comes much sooner, unless the machine has other things to do
    while not condition():
        assert time.monotonic() < deadline, f"within {seconds} s not: {what}"
        time.sleep(0.005)


class RunningFrontend:
    """Use as a context manager. ``http`` is a client of the server; ``engine`` the mock controller
    behind it.

    With ``processes`` above 1 as many frontends share the port, each in a thread of its own.
    """

    def __init__(self, model_path: Path, script: Script, processes: int = 1, **spec: object) -> None:
        self.engine = ScriptedController(script)
        self.acceptor = Acceptor("127.0.0.1", 0, processes)
        self.acceptor.open()
        self.url = f"http://127.0.0.1:{self.acceptor.port}"
        self.specs = [
            FrontendSpec(
                name=f"frontend-{index}",
                index=index,
                keys=self.engine.keys,
                address=self.engine.address,
                model_path=str(model_path),
                served_name=MODEL,
                vocab_size=VOCAB_SIZE,
                acceptor=self.acceptor.spec,
                **spec,  # type: ignore[arg-type]
            )
            for index in range(processes)
        ]
        self.http = httpx.Client(base_url=self.url, timeout=20)
        self._threads = [
            threading.Thread(target=main, args=(spec,), name=spec.name, daemon=True) for spec in self.specs
        ]

    @property
    def spec(self) -> FrontendSpec:
        """The only frontend's."""
        [spec] = self.specs
        return spec

    def __enter__(self) -> RunningFrontend:
        try:
            self.start()
            wait_until(partial(self._ready, len(self.specs)), "every frontend takes connections")
            with ExitStack() as stack:
                one_each = [httpx.Client(base_url=self.url, timeout=20) for _ in self.specs]
                for http in map(stack.enter_context, one_each):
                    wait_until(partial(self._is_up, http), "the frontend answers /health with 200")
            wait_until(self._none_open, "those connections have ended")
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """One after the other: pydantic builds its types in a process by one thread at a time."""
        for number, thread in enumerate(self._threads, start=1):
            thread.start()
            if number < len(self._threads):
                wait_until(partial(self._ready, number), "a frontend takes connections")

    def stop(self) -> None:
        self.http.close()
        self.engine.stop()
        end = time.monotonic() + 30
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, end - time.monotonic()))
        self.close()
        assert not any(thread.is_alive() for thread in self._threads), (
            "a frontend did not leave within 30 s of Stop"
        )

    def close(self) -> None:
        """Closes the sockets that belong to the test, not to the frontend."""
        self.http.close()
        self.acceptor.close()
        self.engine.close()

    def _ready(self, number: int) -> bool:
        started = self._threads[:number]
        assert all(thread.is_alive() for thread in started), "a frontend ended while starting"
        return self.acceptor.num_ready == number

    def _none_open(self) -> bool:
        return not any(channel.num_open for channel in self.acceptor._channels)

    def _is_up(self, http: httpx.Client) -> bool:
        assert all(thread.is_alive() for thread in self._threads), "the frontend ended while starting"
        return http.get("/health").status_code == 200
