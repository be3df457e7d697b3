"""Boards find their series in /metrics: vLLM's own, and ours in recipes/grafana/."""

from __future__ import annotations

import json
import os
import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lockstep
from lockstep.engine.frontend.metrics.counters import Counters, unpack
from lockstep.engine.frontend.metrics.metrics import Metrics
from lockstep.engine.frontend.metrics.shared_counters import SharedCounters, shared_bytes
from lockstep.engine.protocol.cluster_state import ClusterState, RankState, Totals

VLLM = Path(__file__).parent / "vllm_boards.txt"
BOARD = Path(lockstep.__file__).parent / "recipes" / "grafana" / "lockstep.json"
SAMPLE = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? (\S+)$")
# A name in a query that stands before its labels; functions stand before a bracket.
QUERIED = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?=\{)")


def state() -> ClusterState:
    """Two ranks with one MoE layer of two experts, one request waiting for a block."""
    ranks = tuple(RankState(rank, "host", 7, "serving", 1, 2, 3, 8, 0.1, 0.05) for rank in range(2))
    seconds = array("d", [0.5, 0.25]).tobytes()
    totals = Totals(
        tokens_i64=array("q", [3, 4]).tobytes(),
        last_tokens_i64=array("q", [1, 1]).tobytes(),
        busy_f64=seconds,
        waited_f64=seconds,
        phases_f64=seconds * 3,
        load_i64=array("q", [5, 6]).tobytes(),
        balancedness_f64=array("d", [0.9]).tobytes(),
    )
    return ClusterState(
        phase="serving",
        reason="",
        epoch=1,
        step=9,
        max_len=4096,
        page_size=16,
        prefix_caching=True,
        num_running=2,
        num_waiting=3,
        kv_usage=0.5,
        prompt_tokens=120,
        generation_tokens=11,
        prefix_queries=100,
        prefix_hits=64,
        preemptions=1,
        steps=9,
        imbalance=1.5,
        plan_seconds=0.001,
        expert_layers=1,
        expert_i64=array("q", [5, 6]).tobytes(),
        placement_i32=array("i", [0, 0, 0, 0, 1]).tobytes(),
        ranks=ranks,
        number=1,
        totals=totals,
        num_deferred=1,
    )


@pytest.fixture(scope="module")
def samples() -> dict[str, list[tuple[dict[str, str], float]]]:
    """All samples of a serving cluster by name: labels and value."""
    metrics = Metrics("demo")
    metrics.state(state())
    metrics.http("/v1/completions", "POST", 200, 0.1)
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for line in metrics.render(0).decode().splitlines():
        if match := SAMPLE.match(line):
            labels = dict(re.findall(r'(\w+)="([^"]*)"', match[2] or ""))
            found.setdefault(match[1], []).append((labels, float(match[3])))
    return found


def vllm_series() -> list[str]:
    lines = VLLM.read_text().splitlines()
    return [line.split()[0] for line in lines if not line.startswith("#")]


def board() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(BOARD.read_text())
    return document


def panels() -> Iterator[dict[str, Any]]:
    yield from board()["panels"]


def queries() -> list[str]:
    shown = [target["expr"] for panel in panels() for target in panel.get("targets", ())]
    return shown + [item["query"] for item in board()["templating"]["list"] if item["type"] == "query"]


@pytest.mark.parametrize("name", vllm_series())
def test_a_series_of_vllm_s_boards_exists(
    name: str, samples: dict[str, list[tuple[dict[str, str], float]]]
) -> None:
    assert samples[name]
    if name.startswith("vllm:") and name != "vllm:cache_config_info":
        assert {"model_name", "engine"} <= set(samples[name][0][0])


@pytest.mark.parametrize("query", queries())
def test_a_query_of_our_board_finds_its_series_and_labels(
    query: str, samples: dict[str, list[tuple[dict[str, str], float]]]
) -> None:
    for name in QUERIED.findall(query) or re.findall(r"label_values\(([\w:]+)", query):
        assert name in samples, f"{name} is not in /metrics"
        labels = {label for known, _ in samples[name] for label in known}
        selected = set(re.findall(r"(\w+)=~?\"", query)) - {"job", "instance"}
        grouped = {label for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(", ")}
        assert selected | grouped <= labels, f"{name} has the labels {sorted(labels)}"


def test_every_panel_of_our_board_says_what_it_shows_and_has_its_place() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        assert panel["title"]
        if panel["type"] != "row":
            assert panel["description"] and panel["targets"] and panel["fieldConfig"]["defaults"]["unit"]
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not taken & cells and place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells
    numbers = [panel["id"] for panel in panels()]
    assert len(set(numbers)) == len(numbers)


def test_every_family_of_ranks_and_experts_is_on_our_board(
    samples: dict[str, list[tuple[dict[str, str], float]]],
) -> None:
    """A new family of ours is shown or named here. Those under vLLM's names have its boards."""
    elsewhere = {
        "lockstep:step",
        "lockstep:dropped_records_total",
        "lockstep:overlap",
        "lockstep:step_tokens_total",
        "lockstep:step_rows_total",
        "lockstep:dispatch_rows_total",
        "lockstep:rank_num_running",
        "lockstep:rank_wait_seconds",
        "lockstep:rank_step_tokens",
    }
    own = {name for name in samples if name.startswith("lockstep:")}
    own = {name for name in own if "vllm:" + name.removeprefix("lockstep:") not in samples}
    own = {re.sub("_(sum|count)$", "_bucket", name) for name in own}
    shown = {name for query in queries() for name in QUERIED.findall(query)}
    assert own - shown == elsewhere


def test_waiting_requests_and_prompt_tokens_add_up(
    samples: dict[str, list[tuple[dict[str, str], float]]],
) -> None:
    waiting = {labels["reason"]: value for labels, value in samples["vllm:num_requests_waiting_by_reason"]}
    assert waiting == {"capacity": 2, "deferred": 1}
    sources = {labels["source"]: value for labels, value in samples["vllm:prompt_tokens_by_source_total"]}
    assert sources == {"local_compute": 36, "local_cache_hit": 64, "external_kv_transfer": 0}
    assert [value for _, value in samples["vllm:prompt_tokens_cached_total"]] == [64]


def test_a_frontend_among_several_shows_no_process_of_its_own() -> None:
    """Scrapes meet one after another: their CPU seconds would count backwards."""
    for num, shown in ((1, True), (2, False)):
        memory = os.memfd_create("counters")
        os.ftruncate(memory, shared_bytes(num))
        text = Metrics("demo", SharedCounters(memory, 0)).render(0)
        assert (b"process_cpu_seconds_total" in text) is shown


def test_counts_of_another_frontend_are_added_in_every_family() -> None:
    one, other = Counters(), Counters()
    for counters, n in ((one, 1), (other, 3)):
        for histogram in (counters.histograms | counters.sizes).values():
            histogram.observe(2, n)
    one.add(unpack(other.pack(0.0, 0)))
    for name, histogram in (one.histograms | one.sizes).items():
        counts, total = histogram.pack()
        assert (sum(counts), total) == (4, 8), name
