"""``launch timeline`` against a served cluster: every rank and microbatch, and a partial trace
where a rank is killed in the middle.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from support.engine.chrome_trace import check_trace, spans_of
from support.serving.random_checkpoint import CONFIG, write_json
from support.serving.served import ADMIN_KEY, Answer, Ask, Served, serve

STEPS = 40


def command(served: Served, out: Path, steps: int, seconds: float, key: str = ADMIN_KEY) -> Any:
    """The running command; ``communicate`` gives its output."""
    arguments = ["timeline", "--url", served.base, "--out", str(out), "--steps", str(steps)]
    arguments += ["--seconds", str(seconds), "--admin-key-env", "KEY_OF_THE_ADMIN"]
    return subprocess.Popen(
        [sys.executable, "-m", "lockstep.launch.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"KEY_OF_THE_ADMIN": key},
    )


def asked(served: Served, steps: int, seconds: float) -> HTTPConnection:
    """A connection whose request for a timeline has been sent: it comes before all that follow."""
    connection = HTTPConnection(served.base.removeprefix("http://"), timeout=120)
    body = json.dumps({"steps": steps, "seconds": seconds})
    headers = {"Authorization": f"Bearer {ADMIN_KEY}", "Content-Type": "application/json"}
    connection.request("POST", "/admin/timeline", body, headers)
    return connection


class Talking:
    """Four streams at a time, until the end of the block."""

    def __init__(self, served: Served) -> None:
        self._served, self._enough = served, threading.Event()
        self.answers: list[Answer] = []
        self._thread = threading.Thread(target=self._talk, daemon=True)

    def _talk(self) -> None:
        while not self._enough.is_set():
            asks = [Ask({"prompt": [5 + n, 6, 7], "max_tokens": 200, "ignore_eos": True}) for n in range(4)]
            self.answers += self._served.ok(asks)

    def __enter__(self) -> Talking:
        before = self._served.metrics()["generation_tokens_total"]
        self._thread.start()
        self._served.wait_until(
            lambda: self._served.metrics()["generation_tokens_total"] > before, "tokens are generated"
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        self._thread.join(240)
        assert not self._thread.is_alive()


def read(out: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(out.read_text())
    check_trace(document)
    return document


def test_a_served_cluster_shows_its_steps(tmp_path: Path) -> None:
    out = tmp_path / "trace.json"
    write_json(tmp_path / "config.json", CONFIG)
    shape = f"model.path={tmp_path}", "model.weights=random"
    layout = "overlap=on", "parallel.tensor=2", "cluster.ranks_per_node=4"
    with serve(tmp_path / "run", *shape, *layout) as served:
        assert "starting 4 ranks (cpu, fp32, random weights)" in served.launcher.err
        refused = command(served, out, 1, 1.0, key="no")
        _, errors = refused.communicate(timeout=60)
        assert refused.returncode == 2 and "--admin-key-env names the variable" in errors
        idle = command(served, out, 8, 0.5)
        output, _ = idle.communicate(timeout=60)
        assert idle.returncode == 1 and "0 of 8 steps were planned within 0.5 s" in output
        with Talking(served):
            whole = command(served, out, STEPS, 60.0)
            output, errors = whole.communicate(timeout=120)
            assert whole.returncode == 0, errors
        document = read(out)
        assert f"{STEPS} of {STEPS} steps on 4 ranks" in output and document["otherData"]["reason"] == ""
        steps = [event["args"]["step"] for event in spans_of(document, 0, 0)]
        assert len(steps) == STEPS and steps == list(range(steps[0], steps[0] + STEPS))
        for rank in range(4):
            names = {
                (event["tid"], event["name"])
                for track in (1, 2)
                for event in spans_of(document, rank + 1, track)
            }
            for track in (1, 2):
                for name in (
                    "attention",
                    "tensor wait",
                    "gate",
                    "dispatch",
                    "dispatch wait",
                    "experts",
                    "combine",
                ):
                    assert (track, name) in names, f"rank {rank}, microbatch {track - 1}: {name}"
            seen = {event["args"]["step"] for event in spans_of(document, rank + 1, 0)}
            assert seen == set(steps), f"rank {rank}"

        with Talking(served) as talking, closing(asked(served, 512, 60.0)) as cut:
            served.wait_for_state()  # some steps of it
            os.kill(served.launcher.pid_of("rank 3"), signal.SIGKILL)
            answer = cut.getresponse()
            out.write_bytes(answer.read())
            assert answer.status == 200
        assert talking.answers
        document = read(out)
        assert "of 512 steps: rank 3 is lost" in document["otherData"]["reason"]
        assert len(spans_of(document, 1, 0)) > 0
        served.assert_clean()
