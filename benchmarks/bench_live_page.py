"""CPU time of a browser that shows the live page, beside the same browser on an empty one.

A frontend (real sockets) tells of 72 ranks and 58 layers of 256 experts; each second every rank's
times, all counters and all loads change, as they do under traffic. Headless Chromium shows
``/admin/`` and ``about:blank`` in turn, for a window of seconds each; CPU time is that of all its
processes, in per cent of a core. It draws in software, which costs more than a GPU's help does.

    python benchmarks/bench_live_page.py [--windows 3] [--seconds 20]
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from array import array
from itertools import chain
from pathlib import Path

HERE = Path(__file__).resolve().parent
# A script in this folder must not shadow a package.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
sys.path += [str(HERE), str(HERE.parent / "tests")]

import msgspec  # noqa: E402
import psutil  # noqa: E402
from circumstances import commit, hardware  # noqa: E402

from lockstep.engine.protocol.cluster_state import ClusterState, RankState  # noqa: E402
from support.engine.frontend.browser import Browser  # noqa: E402
from support.engine.frontend.running_frontend import RunningFrontend  # noqa: E402
from support.engine.frontend.scripted_controller import STATE, say  # noqa: E402
from support.engine.text.tiny_tokenizer import IM_END, write_model  # noqa: E402

RANKS, LAYERS, EXPERTS, SLOTS = 72, 58, 256, 4
KEY = "a1"


def state(turn: int, rng: random.Random) -> ClusterState:
    """The cluster a second after the one of the turn before."""
    busy = [0.02 + 0.002 * rng.random() for _ in range(RANKS)]
    ranks = tuple(
        RankState(n, f"node-{n // 8}", 1000 + n, "serving", 60, 900, 100, 1600, spent, spent / 9, "reconnect")
        for n, spent in enumerate(busy)
    )
    held = chain.from_iterable(
        (0, LAYERS - 1, n, SLOTS * n % EXPERTS, SLOTS * n % EXPERTS + SLOTS - 1) for n in range(RANKS)
    )
    loads = (int(rng.lognormvariate(8, 1)) for _ in range(LAYERS * EXPERTS))
    return msgspec.structs.replace(
        STATE,
        number=STATE.number + turn,
        step=40 * turn,
        steps=40 * turn,
        generation_tokens=170_000 * turn,
        ranks=ranks,
        num_running=60 * RANKS,
        expert_layers=LAYERS,
        expert_i64=array("q", loads).tobytes(),
        placement_i32=array("i", held).tobytes(),
    )


def cpu_seconds(browser: Browser) -> float:
    """CPU time of all processes of the browser."""
    parent = psutil.Process(browser.pid)
    spent = [process.cpu_times() for process in (parent, *parent.children(recursive=True))]
    return sum(each.user + each.system for each in spent)


class Cluster:
    """The double behind the frontend, under traffic."""

    def __init__(self, frontend: RunningFrontend) -> None:
        self._frontend, self._rng, self._turn = frontend, random.Random(0), 0

    def work(self, seconds: float) -> None:
        """Takes that long and tells of another state each second."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._turn += 1
            self._frontend.engine.state = state(self._turn, self._rng)
            self._frontend.engine.send(self._frontend.engine.state)
            time.sleep(min(left, 1.0))


def window(browser: Browser, cluster: Cluster, url: str, seconds: float) -> float:
    """Per cent of a core while the browser shows ``url``, once it has settled there."""
    browser.open(url)
    cluster.work(3.0)
    began, before = time.monotonic(), cpu_seconds(browser)
    cluster.work(seconds)
    spent = 100 * (cpu_seconds(browser) - before) / (time.monotonic() - began)
    if url != "about:blank":
        assert "All is well" in browser.text("#headline") and not browser.evaluate("document.hidden")
        assert browser.evaluate("seen.state.steps") > 0
    return spent


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--windows", type=int, default=3)
    arguments.add_argument("--seconds", type=float, default=20.0)
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        model = write_model(Path(folder))
        with (
            RunningFrontend(model, say([5, IM_END]), admin_key=KEY) as frontend,
            Browser(Path(folder) / "profile") as browser,
        ):
            cluster = Cluster(frontend)
            page = f"{frontend.url}/admin/"
            browser.open(page)
            browser.evaluate(f"sessionStorage.setItem('adminKey', {KEY!r})")
            found: dict[str, list[float]] = {page: [], "about:blank": []}
            for _ in range(given.windows):
                for url, rows in found.items():
                    rows.append(window(browser, cluster, url, given.seconds))
    print(f"{hardware()}, {commit()}")
    for name, rows in zip(("live page", "empty page"), found.values(), strict=True):
        listed = ", ".join(f"{each:.2f}" for each in rows)
        print(f"{name}: {statistics.median(rows):.2f} % of a core ({listed})")


if __name__ == "__main__":
    main()
