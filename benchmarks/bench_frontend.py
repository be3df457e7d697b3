"""CPU time of the frontend per streamed token, beside the bare cost of an ASGI write.

Four processes: this one, a mock controller that sends a step's tokens every 20 ms, the frontend (``server.main``, real
sockets), and a client that reads 256 streams and throws them away. The limit is measured in the same way with an
application that writes a constant chunk of the same size to each stream: what uvicorn, uvloop and the kernel take.
CPU time is that of the whole process, its ZeroMQ thread included. Windows of both alternate.

    python benchmarks/bench_frontend.py [--streams 256] [--windows 7] [--seconds 2]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import csv
import importlib.metadata
import itertools
import multiprocessing
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]  # a script here must not shadow a package
sys.path.append(str(HERE.parent / "tests"))

import msgspec  # noqa: E402
import uvicorn  # noqa: E402
import uvloop  # noqa: E402

from lockstep.engine.frontend import server  # noqa: E402
from lockstep.engine.specs import FrontendSpec  # noqa: E402
from lockstep.engine.types import Submit  # noqa: E402
from support.running_frontend import MODEL, free_port  # noqa: E402
from support.scripted_controller import STATE, ScriptedController  # noqa: E402
from support.tiny_tokenizer import VOCAB_SIZE, tiny_tokenizer, write_model  # noqa: E402

STEP_SECONDS = 0.02
START_SECONDS = 60
COLUMNS = ("what", "shape", "unit", "p20", "p50", "p80", "limit_p50", "hardware", "versions", "commit")
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


@dataclass(frozen=True)
class Case:
    """One row: ``per_chunk`` tokens in every step of every stream."""

    what: str
    streams: int
    per_chunk: int


# --------------------------------------------------------------------------- the processes


def controller(pipe: Connection, counter: Any, per_chunk: int) -> None:
    words = [token for token in range(3, 399) if tiny_tokenizer().id_to_token(token)]
    rng = random.Random(0)
    chunks = [[rng.choice(words) for _ in range(per_chunk)] for _ in range(997)]

    def script(submit: Submit) -> Iterator[list[int]]:
        for chunk in itertools.cycle(chunks):
            counter.value += len(chunk)
            yield chunk

    state = msgspec.structs.replace(STATE, max_len=10**9, page_size=64)
    engine = ScriptedController(script, step_seconds=STEP_SECONDS, state=state)
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
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        self._sends.append(send)
        while (await receive())["type"] != "http.disconnect":
            pass

    async def write(self) -> None:
        while True:
            await asyncio.sleep(STEP_SECONDS)
            for send in self._sends:
                await send(self._message)
            self._counter.value += len(self._sends)


def bare(port: int, chunk: bytes, counter: Any) -> None:
    """The limit: the same server, nothing but writes."""

    async def serve() -> None:
        app = BareStreams(chunk, counter)
        writing = asyncio.create_task(app.write())
        await uvicorn.Server(
            uvicorn.Config(app, port=port, http="httptools", ws="none", lifespan="off", log_level="warning", access_log=False)
        ).serve()
        writing.cancel()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve())


def clients(port: int, streams: int, ready: Any) -> None:
    """Opens the streams and throws away what comes; sets ``ready`` when each has sent something."""
    body = msgspec.json.encode({"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "stream": True, "ignore_eos": True})
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)

    async def one(started: asyncio.Semaphore) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head + body)
        status = await reader.readline()
        assert b" 200 " in status, status
        started.release()
        while await reader.read(65536):
            pass

    async def run() -> None:
        started = asyncio.Semaphore(0)
        tasks = [asyncio.create_task(one(started)) for _ in range(streams)]
        for _ in range(streams):
            await started.acquire()
        ready.set()
        await asyncio.gather(*tasks)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


# --------------------------------------------------------------------------- measuring


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and all its threads (Linux: the clock id that clock_getcpuclockid gives)."""
    return time.clock_gettime((~pid << 3) | 2)


class Load:
    """A server process with its streams open: ``window`` measures microseconds of CPU per token."""

    def __init__(self, pid: int, counter: Any) -> None:
        self._pid = pid
        self._counter = counter

    def window(self, seconds: float) -> float:
        cpu, tokens = cpu_seconds(self._pid), self._counter.value
        time.sleep(seconds)
        used, count = cpu_seconds(self._pid) - cpu, self._counter.value - tokens
        assert count, "no tokens were streamed in the window"
        return used / count * 1e6


class Bench:
    """Starts processes and ends exactly those."""

    def __init__(self, model: Path) -> None:
        self._spawn = multiprocessing.get_context("spawn")
        self._model = model
        self._children: list[Any] = []
        self._pipes: list[Connection] = []  # a controller leaves when its pipe closes

    def frontend(self, case: Case) -> Load:
        counter = self._spawn.Value("q", 0, lock=False)
        pipe, far = self._spawn.Pipe()
        self._pipes.append(pipe)
        self._start(controller, far, counter, case.per_chunk)
        keys, address = pipe.recv()
        port = free_port()
        spec = FrontendSpec(
            name="frontend0",
            keys=keys,
            address=address,
            model_path=str(self._model),
            served_name=MODEL,
            vocab_size=VOCAB_SIZE,
            host="127.0.0.1",
            port=port,
        )
        process = self._start(frontend, spec)
        self._open_streams(port, case.streams, "/health")
        return Load(process.pid, counter)

    def bare(self, case: Case) -> Load:
        counter = self._spawn.Value("q", 0, lock=False)
        port = free_port()
        process = self._start(bare, port, sample_chunk(case.per_chunk), counter)
        self._open_streams(port, case.streams, None)
        return Load(process.pid, counter)

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

    def _start(self, role: Callable[..., None], *args: Any) -> Any:
        child = self._spawn.Process(target=role, args=args, daemon=True)
        child.start()
        self._children.append(child)
        return child

    def _open_streams(self, port: int, streams: int, health: str | None) -> None:
        wait_for_server(port, health)
        ready = self._spawn.Event()
        self._start(clients, port, streams, ready)
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
    """A chunk of the size the frontend writes."""
    text = "lazy " * per_chunk
    shared = b'{"id":"chatcmpl-0123456789abcdef0123456789abcdef","object":"chat.completion.chunk","created":1700000000,"model":"tiny"'
    return b"data: %s,\"choices\":[{\"index\":0,\"delta\":{\"content\":\"%s\"},\"logprobs\":null,\"finish_reason\":null}]}\n\n" % (
        shared,
        text.encode(),
    )


def measure(case: Case, model: Path, windows: int, seconds: float) -> tuple[list[float], float]:
    """Microseconds per token in each window, and the median cost of a bare write."""
    bench = Bench(model)
    try:
        measured, limit = bench.frontend(case), bench.bare(case)
        ours, floor = [], []
        measured.window(seconds)  # warm-up, dropped
        for _ in range(windows):
            ours.append(measured.window(seconds))
            floor.append(limit.window(seconds))
        return ours, statistics.median(floor) / case.per_chunk
    finally:
        bench.close()


def hardware() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {multiprocessing.cpu_count()} cores, {platform.system()} {platform.release()}"


def versions() -> str:
    names = ("uvicorn", "uvloop", "httptools", "fastapi", "pyzmq", "msgspec", "tokenizers")
    return " ".join([f"python {platform.python_version()}", *(f"{name} {importlib.metadata.version(name)}" for name in names)])


def commit() -> str:
    done = subprocess.run(["git", "-C", str(HERE.parent), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def record(path: Path, case: Case, ours: list[float], limit: float) -> None:
    """Appends a row to the CSV file and prints it."""
    quintiles = statistics.quantiles(ours, n=5, method="inclusive")
    p20, p50, p80 = quintiles[0], statistics.median(ours), quintiles[3]
    shape = f"streams={case.streams} tokens_per_chunk={case.per_chunk} step={STEP_SECONDS * 1000:.0f}ms"
    print(f"{case.what:28} {shape:48} p20 {p20:6.2f}  p50 {p50:6.2f}  p80 {p80:6.2f} us/token   bare write {limit:6.2f}")
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if fresh:
            writer.writerow(COLUMNS)
        figures = [f"{value:.2f}" for value in (p20, p50, p80, limit)]
        writer.writerow([case.what, shape, "us CPU per token", *figures, hardware(), versions(), commit()])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--windows", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--csv", type=Path, default=HERE / "frontend.csv")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / "model")
        for per_chunk in (1, 4):
            case = Case("frontend stream", options.streams, per_chunk)
            record(options.csv, case, *measure(case, model, options.windows, options.seconds))


if __name__ == "__main__":
    main()
