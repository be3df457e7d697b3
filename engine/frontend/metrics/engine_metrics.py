"""The engine's part of /metrics: a ``ClusterState`` as metric families."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ....moe.phases import PHASES
from ...protocol.cluster_state import PLAN_SECONDS, STEP_TOKENS, ClusterState, Totals
from .histogram import Histogram

LABELS = ("model_name", "engine")
PREFIXES = ("vllm", "lockstep")
_BY_REASON = (*LABELS, "reason")
_BY_SOURCE = (*LABELS, "source")
_BY_SLEEP = (*LABELS, "sleep_state")
_REASONS = "waiting requests: for a row or pages (capacity), or for a block that another computes (deferred)"
_SOURCES = "prompt tokens of admitted requests: computed here, from the prefix cache, or transferred"
_CACHE_LABELS = ("engine", "block_size", "num_gpu_blocks", "enable_prefix_caching")

_ONE_RANK = "0 where all experts live on one rank"
_PHASE_TEXTS = {
    "dispatch": "seconds a rank spent sending tokens to the ranks of their experts and waiting for"
    f" tokens sent to it; {_ONE_RANK}",
    "expert": "seconds a rank spent in its experts; where all live on one rank this is one call, from"
    " the norm before them to their sum",
    "combine": "seconds a rank spent returning the outputs of experts to their tokens and adding them"
    f" up; {_ONE_RANK}",
}


def engine_metrics(state: ClusterState, labels: Sequence[str]) -> Iterator[Metric]:
    """All families; ``labels`` are the values of LABELS."""
    yield from _shared(state, labels)
    yield from _group(state, labels)
    yield from _steps(state.totals, labels)
    yield from _ranks(state)
    yield from _experts(state)


def _gauge(name: str, labels: Sequence[str], value: float) -> Metric:
    family = GaugeMetricFamily(name, name.split(":")[1].replace("_", " "), labels=LABELS)
    family.add_metric(labels, value)
    return family


def _counter(name: str, labels: Sequence[str], value: float) -> Metric:
    family = CounterMetricFamily(name, name.split(":")[1].replace("_", " "), labels=LABELS)
    family.add_metric(labels, value)
    return family


def _gauges(name: str, text: str, label: str, column: Mapping[str, float]) -> Metric:
    """A family with a value for each value of ``label``."""
    family = GaugeMetricFamily(name, text, labels=(label,))
    for key, value in column.items():
        family.add_metric((key,), value)
    return family


def _counters(name: str, text: str, label: str, column: Mapping[str, float]) -> Metric:
    """As ``_gauges``, of counters."""
    family = CounterMetricFamily(name, text, labels=(label,))
    for key, value in column.items():
        family.add_metric((key,), value)
    return family


def _shared(state: ClusterState, labels: Sequence[str]) -> Iterator[Metric]:
    """Families that vLLM has too, under both prefixes."""
    gauges = {
        "num_requests_running": state.num_running,
        "num_requests_waiting": state.num_waiting,
        "kv_cache_usage_perc": state.kv_usage,
    }
    counters = {
        "prompt_tokens": state.prompt_tokens,
        "generation_tokens": state.generation_tokens,
        "prefix_cache_queries": state.prefix_queries,
        "prefix_cache_hits": state.prefix_hits,
        "num_preemptions": state.preemptions,
        "prompt_tokens_cached": state.prefix_hits,
    }
    waiting = {
        "capacity": state.num_waiting - state.num_deferred,
        "deferred": state.num_deferred,
    }
    # A prompt counts here when it is admitted for the first time.
    sources = {
        "local_compute": state.prefix_queries - state.prefix_hits,
        "local_cache_hit": state.prefix_hits,
        "external_kv_transfer": 0,
    }
    pages = str(sum(rank.pages_total for rank in state.ranks))
    step_tokens = float(_vector(state.totals.tokens_i64).sum())
    for prefix in PREFIXES:
        for name, value in gauges.items():
            yield _gauge(f"{prefix}:{name}", labels, value)
        for name, value in counters.items():
            yield _counter(f"{prefix}:{name}", labels, value)
        steps = Histogram(STEP_TOKENS).filled(state.totals.step_i64, step_tokens)
        yield steps.family(f"{prefix}:iteration_tokens_total", "tokens computed in a step", LABELS, labels)
        info = GaugeMetricFamily(f"{prefix}:cache_config_info", "the KV cache", labels=_CACHE_LABELS)
        info.add_metric(("0", str(state.page_size), pages, str(state.prefix_caching)), 1)
        yield info
        reasons = GaugeMetricFamily(f"{prefix}:num_requests_waiting_by_reason", _REASONS, labels=_BY_REASON)
        for reason, count in waiting.items():
            reasons.add_metric((*labels, reason), count)
        yield reasons
        by_source = CounterMetricFamily(f"{prefix}:prompt_tokens_by_source", _SOURCES, labels=_BY_SOURCE)
        for source, tokens in sources.items():
            by_source.add_metric((*labels, source), tokens)
        yield by_source
    # Boards tell by it whether the engine is up; there is no sleep mode.
    sleep = GaugeMetricFamily("vllm:engine_sleep_state", "1 for the engine's sleep state", labels=_BY_SLEEP)
    for name in ("awake", "weights_offloaded", "discard_all"):
        sleep.add_metric((*labels, name), name == "awake")
    yield sleep


def _group(state: ClusterState, labels: Sequence[str]) -> Iterator[Metric]:
    gauges = {
        "epoch": state.epoch,
        "step": state.step,
        "imbalance_ratio": state.imbalance,
        "placement_version": state.placement_version,
        "moves_open": state.moves_open,
    }
    for name, value in gauges.items():
        yield _gauge(f"lockstep:{name}", labels, value)
    phase = GaugeMetricFamily("lockstep:phase", "1 for the phase of the cluster", labels=("phase",))
    phase.add_metric((state.phase,), 1)
    yield phase


def _steps(totals: Totals, labels: Sequence[str]) -> Iterator[Metric]:
    plans = Histogram(PLAN_SECONDS).filled(totals.plan_i64, totals.plan_seconds)
    text = "seconds from the results that trigger a plan until it is sent"
    yield plans.family("lockstep:plan_seconds", text, LABELS, labels)
    tokens = int(_vector(totals.tokens_i64).sum())
    yield _counter("lockstep:step_tokens", labels, tokens)
    yield _counter("lockstep:step_rows", labels, totals.rows)
    yield _counter("lockstep:dispatch_rows", labels, totals.dispatch_rows)
    planned = {"rows": totals.rows, "dispatch": totals.dispatch_rows}
    waste = {name: 1 - tokens / rows if rows else 0.0 for name, rows in planned.items()}
    yield _gauges("lockstep:padding_waste", "share of planned rows that hold no token", "of", waste)
    yield _gauge("lockstep:overlap", labels, totals.overlap)
    yield _counter("lockstep:overlapped_steps", labels, totals.overlapped)
    yield _counter("lockstep:moved_bytes", labels, totals.moved_bytes)


def _ranks(state: ClusterState) -> Iterator[Metric]:
    names = ("num_running", "pages_used", "pages_cached", "pages_total", "step_seconds", "wait_seconds")
    for name in names:
        column = {str(rank.rank): float(getattr(rank, name)) for rank in state.ranks}
        yield _gauges(f"lockstep:rank_{name}", f"{name.replace('_', ' ')} of a rank", "rank", column)
    text = "1 for the state that a rank is in"
    states = GaugeMetricFamily("lockstep:rank_state", text, labels=("rank", "host", "state"))
    for rank in state.ranks:
        states.add_metric((str(rank.rank), rank.host, rank.state), 1)
    yield states
    totals = state.totals
    text = "tokens of a data index, computed by all of its ranks"
    yield _counters("lockstep:rank_tokens", text, "data", _column(_vector(totals.tokens_i64)))
    last = _column(_vector(totals.last_tokens_i64))
    yield _gauges("lockstep:rank_step_tokens", f"{text}, in the last step", "data", last)
    seconds = {"rank_busy_seconds": totals.busy_f64, "rank_waited_seconds": totals.waited_f64}
    for name, packed in seconds.items():
        column = _column(np.frombuffer(packed, np.float64))
        yield _counters(f"lockstep:{name}", f"{name.replace('_', ' ')} in steps", "rank", column)
    phases_PW = np.frombuffer(totals.phases_f64, np.float64).reshape(-1, len(PHASES)).T
    for phase, seconds_W in zip(PHASES, phases_PW, strict=True):
        yield _counters(f"lockstep:{phase}_seconds", _PHASE_TEXTS[phase], "rank", _column(seconds_W))


def _experts(state: ClusterState) -> Iterator[Metric]:
    """Loads by layer and rank. By expert they would be 15,000 series for DeepSeek-V3;
    /admin/cluster shows those.
    """
    totals = state.totals
    text = "tokens that experts have computed"
    load = CounterMetricFamily("lockstep:expert_load", text, labels=("layer", "rank"))
    if state.ranks:
        for layer, row in enumerate(_vector(totals.load_i64).reshape(-1, len(state.ranks)).tolist()):
            for rank, tokens in enumerate(row):
                load.add_metric((str(layer), str(rank)), tokens)
    yield load
    balanced = _column(np.frombuffer(totals.balancedness_f64, np.float64))
    text = "mean load / maximum load over ranks, in tokens of the last report"
    yield _gauges("lockstep:balancedness", text, "layer", balanced)
    text = "experts, counted in each MoE layer, that so many ranks hold"
    yield _gauges("lockstep:experts", text, "ranks", _replicas(state.placement_i32))
    if state.expert_layers and state.expert_i64:
        loads = _vector(state.expert_i64).reshape(state.expert_layers, -1)
        mean = _column(loads.mean(axis=1))
        most = _column(loads.max(axis=1))
        yield _gauges("lockstep:expert_tokens_mean", "mean tokens of the experts of a layer", "layer", mean)
        yield _gauges(
            "lockstep:expert_tokens_max", "tokens of the most loaded expert of a layer", "layer", most
        )


@lru_cache(maxsize=2)  # it hardly ever changes
def _replicas(placement_i32: bytes) -> Mapping[str, float]:
    """The number of experts by the number of ranks that hold them, from ranges of layers and
    experts.
    """
    first, last, _, low, high = np.frombuffer(placement_i32, np.int32).reshape(-1, 5).T
    if not len(first):
        return {}
    # Ones at the corners of a range: sums along both axes count the ranges over each expert.
    holders_LE = np.zeros((last.max() + 2, high.max() + 2), np.int64)
    for layers, experts, sign in (
        (first, low, 1),
        (last + 1, low, -1),
        (first, high + 1, -1),
        (last + 1, high + 1, 1),
    ):
        np.add.at(holders_LE, (layers, experts), sign)
    counts = np.bincount(holders_LE.cumsum(0).cumsum(1)[:-1, :-1].ravel())
    return {str(ranks): float(experts) for ranks, experts in enumerate(counts) if experts}


def _vector(packed: bytes) -> NDArray[np.int64]:
    return np.frombuffer(packed, np.int64)


def _column(values: NDArray[np.int64] | NDArray[np.float64]) -> dict[str, float]:
    """Values by their index."""
    return {str(index): float(value) for index, value in enumerate(values.tolist())}
