"""The document of /metrics: the cluster's counters from ``ClusterState``, timings of requests, and
HTTP requests.

Every frontend answers for all: with its own counts of this moment, and with those that the others
published last. Families that vLLM has too appear under both prefixes, with vLLM's labels and
buckets, so that its dashboards and autoscalers work. The rest appears as ``lockstep:`` alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import msgspec
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from ...protocol.cluster_state import ClusterState
from ...protocol.message import encode
from ..requests.generation import Generation
from .counters import Counters, Packed, unpack
from .engine_metrics import LABELS, PREFIXES, engine_metrics
from .shared_counters import SharedCounters

_decode_state = msgspec.msgpack.Decoder(ClusterState).decode
FRESH_SECONDS = 2.0  # a frontend with older counts has gone, together with its open requests


class Metrics(Collector):
    """Updated and read on one event loop. With ``shared`` counters it shows those of all frontends,
    and continues those of an earlier process of this frontend.
    """

    def __init__(self, model_name: str, shared: SharedCounters | None = None) -> None:
        self._labels = (model_name, "0")
        self._state: ClusterState | None = None
        self._own = Counters()
        self._encoded_state = b""
        self._shared = shared
        if shared is not None and (earlier := shared.own()):
            self._own.add(unpack(earlier))
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        if shared is None or shared.alone:  # no process reports for several frontends
            ProcessCollector(registry=self._registry)

    def render(self, num_open: int) -> bytes:
        """Writes the document. Publishes its counts first, so that no other frontend shows lower
        ones later.
        """
        self.publish(num_open)
        return generate_latest(self._registry)

    def publish(self, num_open: int) -> None:
        """Shows the other frontends the counts of this one, which has ``num_open`` requests."""
        if self._shared is not None:
            number = 0 if self._state is None else self._state.number
            self._shared.write(self._own.pack(time.monotonic(), num_open, number, self._encoded_state))

    def open_elsewhere(self) -> int:
        """Open requests of the other frontends, as they published them last."""
        now = time.monotonic()
        return sum(packed.open for packed in self._others() if now - packed.at < FRESH_SECONDS)

    def _others(self) -> list[Packed]:
        return [] if self._shared is None else [unpack(text) for text in self._shared.others()]

    def state(self, state: ClusterState) -> None:
        self._state = state
        self._encoded_state = encode(state)

    def tokens(self, generation: Generation, now: float) -> None:
        """Times the tokens of a step that a generation got at ``now``."""
        if generation.first:
            self._own.inter_token.observe(now - generation.last)
        else:
            generation.first = now
            self._own.first_token.observe(now - generation.submitted)
        generation.last = now

    def finished(self, generation: Generation, now: float) -> None:
        self._own.finished(generation, now)

    def answered(self, choices: Sequence[Generation]) -> None:
        """Counts a prompt of a request whose choices have all been answered."""
        self._own.answered(choices)

    def http(self, handler: str, method: str, status: int, seconds: float) -> None:
        """Counts an HTTP request; ``handler`` is its route, never the path as sent."""
        self._own.request(handler, method, status, seconds)

    def dropped(self, kind: str, count: int) -> None:
        """Counts dropped records about requests; ``kind`` is one of ``DROPPED``."""
        self._own.dropped[kind] += count

    def collect(self) -> Iterator[Metric]:
        total = Counters()
        others = self._others()
        for packed in (unpack(self._own.pack(0.0, 0)), *others):
            total.add(packed)
        state = self._newest(others)
        yield from self._requests(total, float("inf") if state is None else state.max_len)
        yield from self._http_requests(total)
        yield self._dropped(total)
        if state is not None:
            yield from engine_metrics(state, self._labels)

    def _newest(self, others: list[Packed]) -> ClusterState | None:
        """The newest state of any frontend, so that scrapes in turn never count backwards."""
        newest = max(others, key=lambda packed: packed.number, default=None)
        if newest is None or not newest.state:
            return self._state
        if self._state is not None and self._state.number >= newest.number:
            return self._state
        return _decode_state(newest.state)

    def _requests(self, total: Counters, longest: float) -> Iterator[Metric]:
        for prefix in PREFIXES:
            for name, histogram in (total.histograms | total.sizes).items():
                family = HistogramMetricFamily(f"{prefix}:{name}", name.replace("_", " "), labels=LABELS)
                histogram.add_to(family, self._labels, longest if name in total.sizes else float("inf"))
                yield family
            labels = (*LABELS, "finished_reason")
            finished = CounterMetricFamily(
                f"{prefix}:request_success", "requests by the reason they ended", labels=labels
            )
            for reason, count in total.finishes.items():
                finished.add_metric((*self._labels, reason), count)
            yield finished

    def _dropped(self, total: Counters) -> Metric:
        family = CounterMetricFamily(
            "lockstep:dropped_records",
            "spans and lines of the access log that were dropped",
            labels=("kind",),
        )
        for kind, count in total.dropped.items():
            family.add_metric((kind,), count)
        return family

    def _http_requests(self, total: Counters) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "http_requests", "HTTP requests", labels=("handler", "method", "status")
        )
        for labels, count in total.http.items():
            requests.add_metric(labels, count)
        yield requests
        seconds = HistogramMetricFamily(
            "http_request_duration_seconds", "seconds per HTTP request", labels=("handler", "method")
        )
        for key, histogram in total.http_seconds.items():
            histogram.add_to(seconds, key)
        yield seconds
