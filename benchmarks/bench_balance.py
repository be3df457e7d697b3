"""Balance of expert load against experts moved: Lockstep's balancer beside DeepSeek's algorithm.

Loads are lognormal (sigma 1) and drift by a lognormal factor, or follow the demo's routing trace;
both balancers start from the placement that DeepSeek's algorithm gives the loads before. Balance is
maximum / mean load over ranks, averaged over layers; its lower bound is the largest share of one
expert when replicas are chosen freely. Ours is asked for several targets, which gives a curve.

Beside the slots received stands the least that any placement with the replicas of before receives
for the same maxima, layer by layer. No slot is empty, so a rank whose load has to fall gives up an
expert for another: each above the maximum receives; so do colder ranks, until what they may take at
most holds what those have too much.

    python benchmarks/bench_balance.py     writes rows to balance.csv and draws balance.svg
"""

from __future__ import annotations

import csv
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
# A script in this folder must not shadow a package.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
sys.path += [str(HERE), str(HERE.parent / "tests")]

import matplotlib  # noqa: E402
import numpy as np  # noqa: E402
from circumstances import commit, hardware  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

from lockstep.moe.balance.balance import Limits, balance, imbalance  # noqa: E402
from lockstep.moe.balance.layers import Layers  # noqa: E402
from lockstep.moe.balance.placement import Placement  # noqa: E402
from support.moe.eplb import placed_anew  # noqa: E402

TARGETS = (1.2, 1.1, 1.06, 1.04, 1.02, 1.015, 1.01, 1.003, 1.0)
LAYERS, EXPERTS, NODE = 58, 256, 8
COLUMNS = (
    "loads", "ranks", "slots", "drift", "balancer", "target", "max_over_mean", "lower_bound", "received",
    "least_received", "cpu_ms", "hardware", "versions", "commit",
)  # fmt: skip
Loads = NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """Loads before and after a drift on some ranks. ``groups`` of experts that DeepSeek's algorithm
    keeps on a node.
    """

    loads: str
    ranks: int
    slots: int
    drift: str
    before_LE: Loads
    loads_LE: Loads
    nodes: int = 1
    groups: int = 1


def cases() -> Iterator[Case]:
    for redundant, all_ranks in ((32, (32, 72, 144)), (0, (32, 64)), (16, (34, 68)), (64, (32, 64, 80))):
        for ranks in all_ranks:
            for drift in (0.01, 0.1, 0.3):
                dice = np.random.default_rng(ranks)
                before_LE = dice.lognormal(0, 1, (LAYERS, EXPERTS))
                loads_LE = before_LE * dice.lognormal(0, drift, before_LE.shape)
                nodes = max(1, ranks // NODE) if ranks % NODE == 0 else 1
                slots = (EXPERTS + redundant) // ranks
                yield Case(
                    f"lognormal, {redundant} redundant",
                    ranks,
                    slots,
                    str(drift),
                    before_LE,
                    loads_LE,
                    nodes,
                    8,
                )
    with np.load(HERE.parent / "recipes" / "demo" / "routing_trace.npz") as trace:
        windows = (
            trace["counts_SLE"].reshape(8, -1, *trace["counts_SLE"].shape[1:]).sum(axis=1, dtype=np.float64)
        )
    for ranks in (2, 4, 8):
        for redundant in (0, 8):
            slots = (windows.shape[2] + redundant) // ranks
            yield Case(f"demo, {redundant} redundant", ranks, slots, "windows 3 to 5", windows[2], windows[4])


def measure(case: Case) -> Iterator[dict[str, object]]:
    """A row for the placement as it was, for DeepSeek's algorithm, and for each target of ours."""
    before = placed_anew(case.before_LE, case.ranks, case.slots, case.nodes, case.groups)
    drifted = Layers(case.loads_LE, before.experts_LWS)
    bound = drifted.level_L().mean()

    def row(balancer: str, target: str, after: Placement, seconds: float) -> dict[str, object]:
        there_LWSS = after.experts_LWS[..., None] == before.experts_LWS[:, :, None]
        received = (~there_LWSS.any(axis=3) & (after.experts_LWS >= 0)).mean()
        maximum_L = imbalance(case.loads_LE, after)
        least = least_received(drifted.ranks_LW, maximum_L) / case.slots
        values = maximum_L.mean(), bound, received, least, seconds * 1000
        shown = [f"{value:.{digits}f}" for value, digits in zip(values, (4, 4, 4, 4, 1), strict=True)]
        where = hardware(), f"python {platform.python_version()}, numpy {np.__version__}", commit()
        set_up = case.loads, case.ranks, case.slots, case.drift, balancer, target
        return dict(zip(COLUMNS, (*set_up, *shown, *where), strict=True))

    yield row("none", "", before, 0.0)
    began = time.process_time()
    anew = placed_anew(case.loads_LE, case.ranks, case.slots, case.nodes, case.groups)
    yield row("DeepSeek's", "", anew, time.process_time() - began)
    nodes = tuple(np.arange(case.ranks) * case.nodes // case.ranks)
    for target in TARGETS:
        seconds = []
        for _ in range(3):
            began = time.process_time()
            ours = balance(case.loads_LE, before, Limits(node_W=nodes, target=target))
            seconds.append(time.process_time() - began)
        yield row("Lockstep", str(target), ours.placement, sorted(seconds)[1])


def least_received(ranks_LW: Loads, maximum_L: Loads) -> float:
    """Ranks of all that have to receive an expert, in the mean over layers, for no load to exceed
    a layer's maximum.
    """
    above_LW = (ranks_LW - maximum_L[:, None] - 1e-9).clip(0)
    room_LW = np.sort((maximum_L[:, None] - ranks_LW).clip(0), axis=1)[:, ::-1].cumsum(axis=1)
    colder_L = (room_LW < above_LW.sum(axis=1, keepdims=True)).sum(axis=1) + (above_LW > 0).any(axis=1)
    return float(((above_LW > 0).sum(axis=1) + colder_L).mean() / ranks_LW.shape[1])


def draw(rows: list[dict[str, object]], path: Path) -> None:
    panels = list(dict.fromkeys((row["loads"], row["ranks"]) for row in rows))
    matplotlib.rcParams |= {"svg.hashsalt": "lockstep", "svg.fonttype": "none"}
    figure = Figure(figsize=(4.4 * 4, 2.8 * -(-len(panels) // 4) + 0.6), layout="constrained")
    axes = figure.subplots(-(-len(panels) // 4), 4, squeeze=False).flatten()
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes, panels, strict=False):
        mine = [row for row in rows if (row["loads"], row["ranks"]) == panel]
        for number, drift in enumerate(dict.fromkeys(row["drift"] for row in mine)):
            colour, part = f"C{number}", [row for row in mine if row["drift"] == drift]
            ours = [row for row in part if row["balancer"] != "DeepSeek's"]
            points = [(100 * float(str(row["received"])), float(str(row["max_over_mean"]))) for row in ours]
            axis.plot(*zip(*points, strict=True), ".-", color=colour, label=f"drift {drift}")
            least = [
                (100 * float(str(row["least_received"])), float(str(row["max_over_mean"]))) for row in ours
            ]
            axis.plot(*zip(*least, strict=True), "--", color=colour, linewidth=0.6)
            theirs = next(row for row in part if row["balancer"] == "DeepSeek's")
            axis.plot(
                100 * float(str(theirs["received"])), float(str(theirs["max_over_mean"])), "x", color=colour
            )
            axis.axhline(float(str(theirs["lower_bound"])), color=colour, linewidth=0.5, linestyle=":")
        axis.set_title(f"{panel[0]}, {panel[1]} ranks", fontsize=9)
        axis.set_xlabel("slots received, %", fontsize=8)
        axis.set_ylabel("max / mean load", fontsize=8)
        axis.legend(fontsize=7)
    figure.suptitle(
        "Lines: Lockstep from no move on; dashed: the least for as many replicas; x: DeepSeek's algorithm; "
        "dotted: lower bound",
        fontsize=10,
    )
    figure.savefig(path, format="svg", metadata={"Date": None})


def main() -> None:
    rows = []
    for case in cases():
        rows += list(measure(case))
        print(case.loads, case.ranks, "ranks, drift", case.drift, flush=True)
    with (HERE / "balance.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, HERE / "balance.svg")


if __name__ == "__main__":
    main()
