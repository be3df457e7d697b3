"""Export of spans and metrics over OTLP/HTTP, by OpenTelemetry's SDK (extra ``otel``).

The SDK reads its standard variables itself: OTEL_EXPORTER_OTLP_*, OTEL_TRACES_SAMPLER,
OTEL_BSP_*, OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, OTEL_METRIC_EXPORT_INTERVAL,
OTEL_SDK_DISABLED. Nothing here waits for a collector on the thread of a caller.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricExportResult, MetricsData, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

FLUSH_SECONDS = 2.0
_QUIET = ("opentelemetry.exporter", "opentelemetry.sdk._shared_internal", "opentelemetry.sdk.metrics")
_log = logging.getLogger("lockstep.tracing")


class _Counted(SpanExporter):
    """Counts spans that the collector did not take, and says so once until it takes some again."""

    def __init__(self, exporter: SpanExporter, lost: Callable[[int], None]) -> None:
        self._exporter = exporter
        self._lost = lost
        self._away = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        try:
            result = self._exporter.export(spans)
        except Exception:  # a fault of the library costs these spans, not the thread that sends all
            result = SpanExportResult.FAILURE
        if result is SpanExportResult.SUCCESS:
            if self._away:
                _log.info("the collector takes spans again")
            self._away = False
        else:
            self._lost(len(spans))
            if not self._away:
                _log.warning("the collector of frontend.tracing takes no spans: they are dropped")
            self._away = True
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return True


class _Metrics(OTLPMetricExporter):
    """Says once that the collector takes no metrics; the next export has all counts."""

    def __init__(self, endpoint: str | None) -> None:
        super().__init__(endpoint)
        self._away = False

    def export(
        self, metrics_data: MetricsData, timeout_millis: float | None = 10_000, **kwargs: Any
    ) -> MetricExportResult:
        result = super().export(metrics_data, timeout_millis, **kwargs)
        if result is not MetricExportResult.SUCCESS and not self._away:
            _log.warning("the collector of frontend.tracing takes no metrics")
        self._away = result is not MetricExportResult.SUCCESS
        return result


class _Bounded(BatchSpanProcessor):
    """Counts spans that find the queue full: those are dropped, not the ones that wait."""

    def __init__(self, exporter: SpanExporter, lost: Callable[[int], None]) -> None:
        super().__init__(exporter)
        self._lost = lost
        self._full = False

    def on_end(self, span: ReadableSpan) -> None:
        queue = self._batch_processor._queue
        if len(queue) == queue.maxlen:
            self._lost(1)
            if not self._full:
                _log.warning(
                    "%d spans wait for the collector of frontend.tracing: more are dropped", len(queue)
                )
            self._full = True
            return
        if self._full and not queue:
            self._full = False
        super().on_end(span)


class Export:
    """The providers of one process. ``endpoint``: base URL of the collector, empty for the standard
    variables. ``lost`` is called with a number of dropped spans, on any thread.
    """

    def __init__(self, endpoint: str, version: str, instance: str, lost: Callable[[int], None]) -> None:
        for name in _QUIET:  # one warning of ours stands for theirs, which come with every batch
            logging.getLogger(name).setLevel(logging.CRITICAL)
        own = {SERVICE_NAME: "lockstep", "service.version": version, "service.instance.id": instance}
        resource = Resource.create(own).merge(OTELResourceDetector().detect())
        spans = OTLPSpanExporter(_signal(endpoint, "traces"))
        self.tracing = TracerProvider(resource=resource, shutdown_on_exit=False)
        self.tracing.add_span_processor(_Bounded(_Counted(spans, lost), lost))
        reader = PeriodicExportingMetricReader(_Metrics(_signal(endpoint, "metrics")))
        self.metering = MeterProvider([reader], resource=resource, shutdown_on_exit=False)

    def close(self) -> None:
        """Sends what waits, for at most ``FLUSH_SECONDS``."""
        closing = [
            threading.Thread(target=provider.shutdown, name="otlp-close", daemon=True)
            for provider in (self.tracing, self.metering)
        ]
        for thread in closing:
            thread.start()
        for thread in closing:
            thread.join(FLUSH_SECONDS / len(closing))


def _signal(endpoint: str, signal: str) -> str | None:
    """The address of a signal below the collector's; None leaves it to the standard variables."""
    if not endpoint:
        return None
    return f"{endpoint.rstrip('/')}/v1/{signal}"
