"""CPU time of the frontends per streamed token beside a bare ASGI write, and tokens per second.

Processes: this one (which accepts connections, as the launcher does), a mock controller that sends
a step's tokens every 20 ms, one or two frontends (``server.main``, real sockets), and a client that
reads 256 streams and discards them. The limit is measured in the same way with an application that
only writes a constant chunk of the same size to each stream: the cost of uvicorn, uvloop and the
kernel. CPU time is that of whole processes with their ZeroMQ threads. Windows of both alternate.

Rows called "saturated" have steps of 2 ms and count the chunks that the client has read. Chunks per
second grow with the number of frontends as long as there are cores for them, for the mock
controller and for the client. A frontend that lags merges tokens, so there may be fewer chunks than
tokens.

    python benchmarks/bench_frontend.py [--streams 256] [--windows 7] [--seconds 2]
                                        [--processes 1 2] [--per-chunk 1 4] [--saturated]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import csv
import importlib.metadata
import itertools
import math
import multiprocessing
import platform
import random
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# A script in this folder must not shadow a package.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
sys.path += [str(HERE), str(HERE.parent / "tests")]

import msgspec  # noqa: E402
import uvicorn  # noqa: E402
import uvloop  # noqa: E402
from circumstances import commit, hardware  # noqa: E402
from stream_clients import clients  # noqa: E402

from lockstep.engine.frontend import process as server  # noqa: E402
from lockstep.engine.protocol.frontends import Submit  # noqa: E402
from lockstep.engine.protocol.specs import FrontendSpec  # noqa: E402
from lockstep.launch.run.acceptor import Acceptor  # noqa: E402
from support.engine.frontend.running_frontend import MODEL, wait_until  # noqa: E402
from support.engine.frontend.scripted_controller import STATE, ScriptedController  # noqa: E402
from support.engine.text.tiny_tokenizer import VOCAB_SIZE, tiny_tokenizer, write_model  # noqa: E402

STEP_SECONDS = 0.02
# 128,000 tokens per second with 256 streams: more than one frontend can stream, yet streams can
# still be opened.
SATURATED_SECONDS = 0.002
START_SECONDS = 60
COLUMNS = ("what", "shape", "unit", "p20", "p50", "p80", "limit_p50", "hardware", "versions", "commit")
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


@dataclass(frozen=True)
class Case:
    """One case: ``per_chunk`` tokens in every step of every stream, ``processes`` frontends, steps
    of ``step_seconds``.
    """

    streams: int
    per_chunk: int
    processes: int = 1
    step_seconds: float = STEP_SECONDS

    @property
    def what(self) -> str:
        return "frontend stream" + (", saturated" if self.step_seconds < STEP_SECONDS else "")

    @property
    def shape(self) -> str:
        step = f"{self.step_seconds * 1000:.0f}ms" if self.step_seconds >= 0.001 else "none"
        return (
            f"streams={self.streams} tokens_per_chunk={self.per_chunk} step={step} processes={self.processes}"
        )


# --------------------------------------------------------------------------- the processes


def controller(pipe: Connection, counter: Any, per_chunk: int, step_seconds: float) -> None:
    words = [token for token in range(3, 399) if tiny_tokenizer().id_to_token(token)]
    rng = random.Random(0)
    chunks = [[rng.choice(words) for _ in range(per_chunk)] for _ in range(997)]

    def script(submit: Submit) -> Iterator[list[int]]:
        for chunk in itertools.cycle(chunks):
            counter.value += len(chunk)
            yield chunk

    state = msgspec.structs.replace(STATE, max_len=10**9, page_size=64)
    engine = ScriptedController(script, step_seconds=step_seconds, state=state)
    pipe.send((engine.keys, engine.address))
    with contextlib.suppress(EOFError):
        pipe.recv()
    engine.close()


def frontend(spec: FrontendSpec) -> None:
    server.main(spec)


class BareStreams:
    """Writes one constant chunk per step to every open stream."""

    def __init__(self, chunk: bytes, counter: Any) -> None:
        self._message = {"type": "http.response.body", "body": chunk, "more_body": True}
        self._counter = counter
        self._sends: list[Send] = []

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"content-type", b"text/event-stream")],
            }
        )
        self._sends.append(send)
        while (await receive())["type"] != "http.disconnect":
            pass

    async def write(self) -> None:
        while True:
            await asyncio.sleep(STEP_SECONDS)
            for send in self._sends:
                await send(self._message)
            self._counter.value += len(self._sends)


def bare(pipe: Connection, chunk: bytes, counter: Any) -> None:
    """The limit: the same server, which does nothing but write."""

    async def serve() -> None:
        app = BareStreams(chunk, counter)
        listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
        pipe.send(listener.getsockname()[1])
        writing = asyncio.create_task(app.write())
        config = uvicorn.Config(
            app, http="httptools", ws="none", lifespan="off", log_level="warning", access_log=False
        )
        await uvicorn.Server(config).serve([listener])
        writing.cancel()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve())


# --------------------------------------------------------------------------- measuring


def cpu_seconds(pid: int) -> float:
    """CPU time of a process with all its threads (Linux: the clock id from clock_getcpuclockid)."""
    return time.clock_gettime((~pid << 3) | 2)


class Load:
    """Server processes with open streams. ``window`` measures microseconds of CPU per token (or
    chunk), and tokens (or chunks) per second.
    """

    def __init__(self, pids: list[int], counter: Any) -> None:
        self._pids = pids
        self._counter = counter

    def window(self, seconds: float) -> tuple[float, float]:
        began, cpu, tokens = time.perf_counter(), self._used(), self._counter.value
        time.sleep(seconds)
        used, count = self._used() - cpu, self._counter.value - tokens
        assert count, "no tokens were streamed in the window"
        return used / count * 1e6, count / (time.perf_counter() - began)

    def _used(self) -> float:
        return sum(cpu_seconds(pid) for pid in self._pids)


class Bench:
    """Starts processes and ends exactly those."""

    def __init__(self, model: Path) -> None:
        self._spawn = multiprocessing.get_context("spawn")
        self._model = model
        self._children: list[Any] = []
        self._acceptors: list[Acceptor] = []
        self._pipes: list[Connection] = []  # a controller ends when its pipe closes

    def frontend(self, case: Case) -> Load:
        counter = self._spawn.Value("q", 0, lock=False)
        pipe, far = self._spawn.Pipe()
        self._pipes.append(pipe)
        self._start(controller, far, counter, case.per_chunk, case.step_seconds)
        keys, address = pipe.recv()
        acceptor = Acceptor("127.0.0.1", 0, case.processes)
        self._acceptors.append(acceptor)
        processes = []
        for index in range(case.processes):
            spec = FrontendSpec(
                name=f"frontend-{index}",
                index=index,
                keys=keys,
                address=address,
                acceptor=acceptor.spec,
                model_path=str(self._model),
                served_name=MODEL,
                vocab_size=VOCAB_SIZE,
            )
            processes.append(self._start(frontend, spec))
        wait_until(lambda: acceptor.num_ready == case.processes, "all frontends are ready", START_SECONDS)
        acceptor.open()
        chunks = None if case.step_seconds >= STEP_SECONDS else self._spawn.Value("q", 0, lock=False)
        self._open_streams(acceptor.port, case.streams, "/health", chunks)
        return Load([process.pid for process in processes], counter if chunks is None else chunks)

    def bare(self, case: Case) -> Load:
        counter = self._spawn.Value("q", 0, lock=False)
        pipe, far = self._spawn.Pipe()
        process = self._start(bare, far, sample_chunk(case.per_chunk), counter)
        self._open_streams(pipe.recv(), case.streams, None)
        return Load([process.pid], counter)

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for child in reversed(self._children):
            child.terminate()
        for child in self._children:
            child.join(15)
            if child.is_alive():
                child.kill()
        self._children.clear()
        for acceptor in self._acceptors:
            acceptor.close()

    def _start(self, role: Callable[..., None], *args: Any) -> Any:
        child = self._spawn.Process(target=role, args=args, daemon=True)
        child.start()
        self._children.append(child)
        return child

    def _open_streams(self, port: int, streams: int, health: str | None, chunks: Any = None) -> None:
        wait_for_server(port, health)
        ready = self._spawn.Event()
        self._start(clients, port, MODEL, streams, ready, chunks)
        assert ready.wait(START_SECONDS), f"{streams} streams were not open within {START_SECONDS} s"


def wait_for_server(port: int, health: str | None) -> None:
    import http.client

    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
            connection.connect()
            if health is None:
                return
            connection.request("GET", health)
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        assert time.monotonic() < deadline, f"the server on port {port} was not up within {START_SECONDS} s"
        time.sleep(0.05)


def sample_chunk(per_chunk: int) -> bytes:
    """A chunk of the size that the frontend writes."""
    text = "lazy " * per_chunk
    return (
        b'data: {"id":"chatcmpl-0123456789abcdef0123456789abcdef","object":"chat.completion.chunk",'
        b'"created":1700000000,"model":"tiny","choices":[{"index":0,"delta":{"content":"%s"},'
        b'"logprobs":null,"finish_reason":null}]}\n\n' % text.encode()
    )


@dataclass
class Measured:
    """Windows of a case: microseconds of CPU per token, tokens (or chunks) per second, and the
    median cost of a bare write per token.
    """

    cpu: list[float]
    rate: list[float]
    limit: float


def measure(case: Case, model: Path, windows: int, seconds: float) -> Measured:
    """Measures windows of the frontends and, if steps pause, of bare writes in turn. Beside
    saturated steps a bare write measures nothing.
    """
    bench = Bench(model)
    try:
        measured = bench.frontend(case)
        limit = bench.bare(case) if case.step_seconds >= STEP_SECONDS else None
        found, floor = Measured([], [], math.nan), []
        measured.window(seconds)  # warm-up, dropped
        for _ in range(windows):
            cpu, rate = measured.window(seconds)
            found.cpu.append(cpu)
            found.rate.append(rate)
            if limit is not None:
                floor.append(limit.window(seconds)[0])
        if floor:
            found.limit = statistics.median(floor) / case.per_chunk
        return found
    finally:
        bench.close()


def versions() -> str:
    names = ("uvicorn", "uvloop", "httptools", "fastapi", "pyzmq", "msgspec", "tokenizers")
    found = [f"{name} {importlib.metadata.version(name)}" for name in names]
    return " ".join([f"python {platform.python_version()}", *found])


def record(path: Path, case: Case, measured: Measured) -> None:
    """Appends the rows of a case to the CSV file and prints them."""
    if case.step_seconds >= STEP_SECONDS:
        row(path, case, "us CPU per token", measured.cpu, measured.limit)
    else:
        row(path, case, "us CPU per chunk", measured.cpu, math.nan)
        row(path, case, "chunks per second", measured.rate, math.nan)


def row(path: Path, case: Case, unit: str, values: list[float], limit: float) -> None:
    quintiles = statistics.quantiles(values, n=5, method="inclusive")
    p20, p50, p80 = quintiles[0], statistics.median(values), quintiles[3]
    figures = f"p20 {p20:9.2f}  p50 {p50:9.2f}  p80 {p80:9.2f} {unit}   bare write {limit:6.2f}"
    print(f"{case.what:28} {case.shape:60} {figures}", flush=True)
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if fresh:
            writer.writerow(COLUMNS)
        times = [f"{value:.2f}" for value in (p20, p50, p80)]
        times.append("" if math.isnan(limit) else f"{limit:.2f}")
        writer.writerow([case.what, case.shape, unit, *times, hardware(), versions(), commit()])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--windows", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--processes", type=int, nargs="+", default=[1])
    parser.add_argument("--per-chunk", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--saturated", action="store_true")
    parser.add_argument("--csv", type=Path, default=HERE / "frontend.csv")
    options = parser.parse_args()
    step_seconds = SATURATED_SECONDS if options.saturated else STEP_SECONDS
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / "model")
        for processes in options.processes:
            for per_chunk in options.per_chunk:
                case = Case(options.streams, per_chunk, processes, step_seconds)
                record(options.csv, case, measure(case, model, options.windows, options.seconds))


if __name__ == "__main__":
    main()
