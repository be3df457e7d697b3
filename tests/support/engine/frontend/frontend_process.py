"""A real frontend in a process of its own, with a heart on its event loop that says for how long
the loop has stood.
"""

from __future__ import annotations

import asyncio
import ctypes
import multiprocessing
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from lockstep.engine.frontend import process
from lockstep.engine.protocol.specs import FrontendLimits, FrontendSpec
from lockstep.launch.run.acceptor import Acceptor

from ..text.tiny_tokenizer import VOCAB_SIZE
from .running_frontend import MODEL, wait_until
from .scripted_controller import Script, ScriptedController

BEAT_SECONDS = 0.01
_spawn = multiprocessing.get_context("spawn")


class FrontendProcess:
    """``http`` is a client; ``stall`` the longest time the loop stood since ``reset``, in seconds
    of the process's own CPU time, so that other load on the machine does not count.
    """

    def __init__(self, spec: FrontendSpec, port: int, engine: ScriptedController) -> None:
        self.port = port
        self.engine = engine
        self._stall = _spawn.Value(ctypes.c_double, 0.0)
        self._process = _spawn.Process(target=_main, args=(spec, self._stall), daemon=True)
        self._process.start()
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)

    @property
    def stall(self) -> float:
        return float(self._stall.value)

    def reset(self) -> None:
        """Forgets the stalls so far."""
        time.sleep(2 * BEAT_SECONDS)  # a beat may be late by what came before
        self._stall.value = 0.0

    @property
    def cpu_seconds(self) -> float:
        times = psutil.Process(self._process.pid).cpu_times()
        return float(times.user + times.system)

    @property
    def memory(self) -> int:
        """Resident bytes."""
        return int(psutil.Process(self._process.pid).memory_info().rss)

    def connect(self, seconds: float = 60.0) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=seconds)

    def close(self) -> None:
        self.http.close()
        self._process.terminate()
        self._process.join(30)
        assert self._process.exitcode is not None, "the frontend did not leave within 30 s of SIGTERM"


@contextmanager
def frontend_process(model: Path, script: Script, **limits: Any) -> Iterator[FrontendProcess]:
    """A frontend that serves; its controller is scripted."""
    with ExitStack() as stack:
        engine = ScriptedController(script)
        stack.callback(engine.close)
        acceptor = Acceptor("127.0.0.1", 0, 1)
        stack.callback(acceptor.close)
        spec = FrontendSpec(
            name="frontend-0",
            keys=engine.keys,
            address=engine.address,
            model_path=str(model),
            served_name=MODEL,
            vocab_size=VOCAB_SIZE,
            acceptor=acceptor.spec,
            limits=FrontendLimits(**limits),
        )
        frontend = FrontendProcess(spec, acceptor.port, engine)
        stack.callback(frontend.close)
        wait_until(lambda: acceptor.num_ready == 1, "the frontend takes connections", 120)
        acceptor.open()
        wait_until(lambda: frontend.http.get("/health").status_code == 200, "/health answers 200")
        yield frontend


def _main(spec: FrontendSpec, stall: Any) -> None:
    build = process.build_app

    def build_with_heart(*arguments: Any) -> Any:
        beating = asyncio.get_running_loop().create_task(_beat(stall))
        app = build(*arguments)
        app.beating = beating  # type: ignore[attr-defined]  # the loop keeps no task alive
        return app

    process.build_app = build_with_heart
    process.main(spec)


async def _beat(stall: Any) -> None:
    """The loop stood between two beats for at most their distance, and for at most the CPU time
    that the process has used meanwhile.
    """
    thread = threading.get_ident()
    assert thread == threading.main_thread().ident
    wall, used = time.monotonic(), time.process_time()
    while True:
        await asyncio.sleep(BEAT_SECONDS)
        before, used_before = wall, used
        wall, used = time.monotonic(), time.process_time()
        stall.value = max(stall.value, min(wall - before, used - used_before) - BEAT_SECONDS)
