"""Draws a step of two ranks, at once and as two microbatches, with a delay in every dispatch and
combine: from the spans that ranks note for ``launch timeline``.

    python benchmarks/draw_timeline.py [--delay 2] [--prompt 256] [--traces FOLDER]

Model, ranks and delay are those of ``bench_overlap.py``. Of several steps the shortest is drawn.
``--traces`` keeps what was recorded, for https://ui.perfetto.dev.
"""

from __future__ import annotations

import argparse
import json
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import torch
from bench_overlap import CPU, WORLD, Case, Delayed, Rank, running_ranks
from circumstances import hardware
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch.distributed import TCPStore

from lockstep.engine.protocol.timeline import StepSpans, TimelineEnd, Track
from lockstep.engine.tracing.timeline import chrome_trace
from lockstep.parallel.mesh import Mesh

PICTURE = Path(__file__).parent / "timeline.svg"
WARM_UP, STEPS = 3, 9
COLOURS = {
    "attention": "#4878a8",
    "gate": "#9bb8d3",
    "experts": "#e08a3c",
    "dispatch": "#7ab27a",
    "combine": "#a584b8",
    "other": "#c9c9c9",
    "dispatch wait": "#c0392b",
    "combine wait": "#e58e83",
}
TITLES = {1: "overlap off: one microbatch", 2: "overlap on: two microbatches take turns"}
Document = dict[str, Any]


def rank_process(path: Path, index: int, port: int, arguments: argparse.Namespace, out: Any) -> None:
    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=300))
    collectives = Delayed("experts", index, WORLD, store, 300.0, CPU)
    collectives.build(0)
    collectives.delay = arguments.delay / 1000
    rank, case = Rank(path, collectives), Case(0, 0, prompt=arguments.prompt)
    for microbatches in TITLES:
        for number in range(WARM_UP + STEPS):
            rank.step(case, microbatches, trace=number >= WARM_UP)
            spans = rank.take_spans()
            if spans is not None:
                out.put((microbatches, spans))
    out.put(None)
    rank.gathered(0.0)


def recorded(arguments: argparse.Namespace) -> dict[int, Document]:
    """Traces by the number of microbatches."""
    found: dict[int, list[StepSpans]] = {microbatches: [] for microbatches in TITLES}
    with running_ranks(rank_process, arguments) as out:
        ended = 0
        while ended < WORLD:
            item = out.get(timeout=600)
            if item is None:
                ended += 1
            else:
                found[item[0]].append(item[1])
    end = TimelineEnd(1, "", mesh=Mesh(data=WORLD))
    hosts = dict.fromkeys(range(WORLD), "this")
    return {number: json.loads(chrome_trace(end, spans, hosts)) for number, spans in found.items()}


def quietest_step(document: Document) -> int:
    """The shortest step: others shared the cores with something else."""
    lengths: dict[int, float] = {}
    for event in document["traceEvents"]:
        if event["ph"] == "X" and event["name"].startswith("step "):
            step = event["args"]["step"]
            lengths[step] = max(lengths.get(step, 0.0), event["dur"])
    return min(lengths, key=lambda step: lengths[step])


def spans_of(document: Document, step: int) -> list[tuple[int, int, str, float, float]]:
    """Rank, track, name, begin and length in milliseconds from the first begin of a step."""
    events = [
        event for event in document["traceEvents"] if event["ph"] == "X" and event["args"]["step"] == step
    ]
    start = min(event["ts"] for event in events)
    return [
        (each["pid"] - 1, each["tid"], each["name"], (each["ts"] - start) / 1000, each["dur"] / 1000)
        for each in events
    ]


def draw(axes: Axes, title: str, spans: list[tuple[int, int, str, float, float]]) -> None:
    """A line for every microbatch of every rank; waits are lower, inside of what they are in."""
    lines: dict[tuple[int, int], int] = {}
    bars: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for rank, track, name, begin, length in spans:
        if track != Track.STEP:
            line = lines.setdefault((rank, track), len(lines))
            bars.setdefault((line, name if name in COLOURS else "other"), []).append((begin, length))
    for (line, name), found in sorted(bars.items(), key=lambda bar: bar[0][1].endswith("wait")):
        height = 0.45 if name.endswith("wait") else 0.8
        axes.broken_barh(found, (line - height / 2, height), color=COLOURS[name])
    whole = max(length for _, track, name, _, length in spans if track == Track.STEP)
    axes.set_title(f"{title}, {whole:.0f} ms", loc="left", fontsize=10)
    axes.set_yticks(
        list(lines.values()), [f"rank {rank}, microbatch {track - 1}" for rank, track in lines], fontsize=8
    )
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--delay", type=float, default=2.0, help="milliseconds of each collective")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prompt on each rank")
    parser.add_argument("--traces", type=Path, help="folder to keep the traces in")
    arguments = parser.parse_args()
    documents = recorded(arguments)
    if arguments.traces is not None:
        arguments.traces.mkdir(parents=True, exist_ok=True)
        for number, document in documents.items():
            (arguments.traces / f"microbatches-{number}.json").write_text(json.dumps(document))
    matplotlib.rcParams |= {"svg.hashsalt": "lockstep", "svg.fonttype": "none"}
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    panels = figure.subplots(len(TITLES), 1, sharex=True, height_ratios=list(TITLES))
    for axes, (number, title) in zip(panels, TITLES.items(), strict=True):
        draw(axes, title, sorted(spans_of(documents[number], quietest_step(documents[number]))))
    panels[-1].set_xlabel("milliseconds")
    patches = [Patch(color=colour, label=name) for name, colour in COLOURS.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=8, frameon=False)
    delay = f"{arguments.delay:g} ms of delay in every exchange"
    figure.suptitle(
        f"A prompt of {arguments.prompt} tokens on each of two ranks, {delay}; {hardware()}", fontsize=9
    )
    figure.savefig(PICTURE, format="svg", metadata={"Date": None})
    print(PICTURE)
    os._exit(0)  # the store's threads do not end by themselves


if __name__ == "__main__":
    main()
