"""What /metrics shows: counters of the cluster from ``ClusterState``, timings of this frontend's requests, HTTP requests.

Families that vLLM also has appear under both prefixes with its labels and buckets, so that its dashboards and
autoscalers work; the rest appear as ``lockstep:`` alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from ..types import ClusterState
from .generation import Generation
from .histogram import Histogram

FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
PER_REQUEST = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
PER_STEP = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
HTTP_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
SIZES = ("request_prompt_tokens", "request_generation_tokens")
REASONS = ("stop", "length", "abort", "error")
LABELS = ("model_name", "engine")
PREFIXES = ("vllm", "lockstep")
REQUEST_PHASES = ("e2e_request_latency", "request_queue_time", "request_prefill_time", "request_decode_time", "request_inference_time")


def one_two_five(limit: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50, ... up to ``limit``."""
    bounds = (digit * 10**power for power in range(12) for digit in (1, 2, 5))
    return tuple(bound for bound in bounds if bound <= limit)


class Metrics(Collector):
    """Told by the event loop, read by /metrics on the same loop."""

    def __init__(self, model_name: str) -> None:
        self._labels = (model_name, "0")
        self._state: ClusterState | None = None
        self._finishes = Counter(dict.fromkeys(REASONS, 0))
        self._http: Counter[tuple[str, str, str]] = Counter()
        self._http_seconds: dict[tuple[str, str], Histogram] = {}
        self.first_token = Histogram(FIRST_TOKEN)
        self.inter_token = Histogram(PER_TOKEN)
        self._per_token = Histogram(PER_TOKEN)
        self._phases = {name: Histogram(PER_REQUEST) for name in REQUEST_PHASES}
        self._step_tokens = Histogram(PER_STEP)
        self._sizes: dict[str, Histogram] = {}  # made when the first state says how long a sequence may be
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def render(self) -> bytes:
        return generate_latest(self._registry)

    def state(self, state: ClusterState) -> None:
        """The newest state; the steps since the last one are booked with their mean tokens."""
        last = self._state
        if last is None:
            self._sizes = {name: Histogram(one_two_five(state.max_len)) for name in SIZES}
        if last is not None and state.steps > last.steps:
            steps = state.steps - last.steps
            tokens = state.prompt_tokens + state.generation_tokens - last.prompt_tokens - last.generation_tokens
            self._step_tokens.observe(max(0, tokens) / steps, steps)
        self._state = state

    def tokens(self, generation: Generation, now: float) -> None:
        """A step's tokens of a generation arrived at ``now``."""
        if generation.first:
            self.inter_token.observe(now - generation.last)
        else:
            generation.first = now
            self.first_token.observe(now - generation.submitted)
        generation.last = now

    def finished(self, generation: Generation, now: float) -> None:
        self._finishes[generation.finish or "error"] += 1
        if generation.finish == "error" or not generation.first:
            return
        started = generation.started or generation.first
        seconds = {
            "e2e_request_latency": now - generation.submitted,
            "request_queue_time": started - generation.submitted,
            "request_prefill_time": generation.first - started,
            "request_decode_time": generation.last - generation.first,
            "request_inference_time": generation.last - started,
        }
        for name, value in seconds.items():
            self._phases[name].observe(value)
        num_tokens = len(generation.tokens)
        if num_tokens > 1:
            self._per_token.observe((generation.last - generation.first) / (num_tokens - 1))
        for name, size in zip(SIZES, (len(generation.prompt), num_tokens), strict=True):
            if name in self._sizes:
                self._sizes[name].observe(size)

    def http(self, handler: str, method: str, status: int, seconds: float) -> None:
        """``handler`` is a route, never a path as sent: labels stay few."""
        self._http[handler, method, f"{status // 100}xx"] += 1
        key = handler, method
        if key not in self._http_seconds:
            self._http_seconds[key] = Histogram(HTTP_SECONDS)
        self._http_seconds[key].observe(seconds)

    def collect(self) -> Iterator[Metric]:
        yield from self._requests()
        yield from self._http_requests()
        if self._state is not None:
            yield from self._cluster(self._state)
            yield from self._ranks(self._state)
            yield from self._experts(self._state)

    def _requests(self) -> Iterator[Metric]:
        timings = {
            "time_to_first_token_seconds": self.first_token,
            "inter_token_latency_seconds": self.inter_token,
            "request_time_per_output_token_seconds": self._per_token,
            "iteration_tokens_total": self._step_tokens,
            **{f"{name}_seconds": histogram for name, histogram in self._phases.items()},
            **self._sizes,
        }
        for prefix in PREFIXES:
            for name, histogram in timings.items():
                family = HistogramMetricFamily(f"{prefix}:{name}", name.replace("_", " "), labels=LABELS)
                histogram.add_to(family, self._labels)
                yield family
            labels = (*LABELS, "finished_reason")
            finished = CounterMetricFamily(f"{prefix}:request_success", "requests by the reason they ended", labels=labels)
            for reason, count in self._finishes.items():
                finished.add_metric((*self._labels, reason), count)
            yield finished

    def _http_requests(self) -> Iterator[Metric]:
        requests = CounterMetricFamily("http_requests", "HTTP requests", labels=("handler", "method", "status"))
        for labels, count in self._http.items():
            requests.add_metric(labels, count)
        yield requests
        seconds = HistogramMetricFamily("http_request_duration_seconds", "seconds per HTTP request", labels=("handler", "method"))
        for key, histogram in self._http_seconds.items():
            histogram.add_to(seconds, key)
        yield seconds

    def _cluster(self, state: ClusterState) -> Iterator[Metric]:
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
        }
        for prefix in PREFIXES:
            for name, value in gauges.items():
                yield self._gauge(f"{prefix}:{name}", value)
            for name, value in counters.items():
                family = CounterMetricFamily(f"{prefix}:{name}", name.replace("_", " "), labels=LABELS)
                family.add_metric(self._labels, value)
                yield family
            pages = str(sum(rank.pages_total for rank in state.ranks))
            info = GaugeMetricFamily(
                f"{prefix}:cache_config_info", "the KV cache", labels=("engine", "block_size", "num_gpu_blocks", "enable_prefix_caching")
            )
            info.add_metric(("0", str(state.page_size), pages, str(state.prefix_caching)), 1)
            yield info
        own = {"epoch": state.epoch, "step": state.step, "imbalance_ratio": state.imbalance, "plan_seconds": state.plan_seconds}
        for name, value in own.items():
            yield self._gauge(f"lockstep:{name}", value)
        phase = GaugeMetricFamily("lockstep:phase", "1 for the phase of the cluster", labels=("phase",))
        phase.add_metric((state.phase,), 1)
        yield phase

    def _ranks(self, state: ClusterState) -> Iterator[Metric]:
        names = ("num_running", "pages_used", "pages_cached", "pages_total", "step_seconds", "wait_seconds")
        for name in names:
            family = GaugeMetricFamily(f"lockstep:rank_{name}", f"{name.replace('_', ' ')} of a rank", labels=("rank",))
            for rank in state.ranks:
                family.add_metric((str(rank.rank),), getattr(rank, name))
            yield family
        states = GaugeMetricFamily("lockstep:rank_state", "1 for the state a rank is in", labels=("rank", "host", "state"))
        for rank in state.ranks:
            states.add_metric((str(rank.rank), rank.host, rank.state), 1)
        yield states

    def _experts(self, state: ClusterState) -> Iterator[Metric]:
        """Load per layer: the whole matrix would be 15,000 series for DeepSeek-V3; /admin/cluster has it."""
        if not state.expert_layers or not state.expert_i64:
            return
        loads = np.frombuffer(state.expert_i64, "<i8").reshape(state.expert_layers, -1)
        mean, most = loads.mean(axis=1), loads.max(axis=1)
        columns = {"expert_tokens_mean": mean, "expert_tokens_max": most, "expert_balancedness": mean / np.maximum(most, 1)}
        for name, values in columns.items():
            family = GaugeMetricFamily(f"lockstep:{name}", f"{name.replace('_', ' ')} of a layer", labels=("layer",))
            for layer, value in enumerate(values.tolist()):
                family.add_metric((str(layer),), value)
            yield family

    def _gauge(self, name: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, name.split(":")[1].replace("_", " "), labels=LABELS)
        family.add_metric(self._labels, value)
        return family

