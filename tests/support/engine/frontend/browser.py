"""A headless Chromium, driven over its DevTools protocol."""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
from websockets.sync.client import connect

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Browser:
    """One page of a browser with a profile of its own in ``folder``. Use as a context manager."""

    def __init__(self, folder: Path) -> None:
        assert CHROMIUM is not None
        self._numbers = itertools.count(1)
        self.problems: list[str] = []
        self._process = subprocess.Popen(
            [
                CHROMIUM,
                *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
                *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
                *("--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._stack = ExitStack()
        self._stack.callback(self._end)
        try:
            port = self._port(folder / "DevToolsActivePort")
            pages = httpx.get(f"http://127.0.0.1:{port}/json/list", timeout=30).json()
            target = next(page for page in pages if page["type"] == "page")
            address = target["webSocketDebuggerUrl"]
            self._socket = self._stack.enter_context(connect(address, max_size=None, proxy=None))
            for domain in ("Page", "Runtime", "Log"):
                self.call(f"{domain}.enable")
        except BaseException:
            self._stack.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def _port(self, file: Path, seconds: float = 60.0) -> int:
        deadline = time.monotonic() + seconds
        while not (file.exists() and file.read_text().count("\n")):
            assert self._process.poll() is None, f"chromium left with {self._process.returncode}"
            assert time.monotonic() < deadline, f"chromium opened no port within {seconds:g} s"
            time.sleep(0.05)
        return int(file.read_text().split()[0])

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a command; problems that the page reports meanwhile are kept."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=60))
            if message.get("id") == number:
                assert "error" not in message, message
                return dict(message["result"])
            if message.get("method") == "Runtime.exceptionThrown":
                self.problems.append(json.dumps(message["params"]["exceptionDetails"]))
            elif message.get("method") == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
                self.problems.append(message["params"]["entry"]["text"])

    def evaluate(self, script: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def open(self, url: str, width: int = 1440, height: int = 900, scheme: str = "light") -> None:
        self.size(width, height)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.evaluate("window.before = true")
        self.call("Page.navigate", url=url)
        self.wait_for("!window.before && document.readyState === 'complete'")

    def size(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)

    def text(self, selector: str) -> str:
        script = f"document.querySelector({json.dumps(selector)})?.innerText ?? ''"
        return str(self.evaluate(script))

    def wait_for(self, script: str, seconds: float = 30.0) -> None:
        """Until the expression holds in the page."""
        deadline = time.monotonic() + seconds
        while not self.evaluate(script):
            if time.monotonic() > deadline:
                shown = self.evaluate("document.body.innerText")
                raise AssertionError(f"within {seconds:g} s not: {script}\n{shown}\n{self.problems}")
            time.sleep(0.05)

    def picture(self, file: Path) -> None:
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=False)
        file.write_bytes(base64.b64decode(answer["data"]))

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
