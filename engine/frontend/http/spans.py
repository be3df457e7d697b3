"""The spans of requests: one of the server for each, below it queue, prefill and decode of each
choice, from times that the frontend has measured anyway; and the histograms ``gen_ai.server.*``.

Names follow OpenTelemetry's semantic conventions 1.44 for HTTP servers, and those for GenAI (in
``opentelemetry-semantic-conventions`` 0.66b2, now semantic-conventions-genai; status: development).
Names of our own begin with ``lockstep.``. Neither prompts nor answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, SpanKind, StatusCode, TraceFlags
from opentelemetry.trace.span import TraceState

from .... import __version__
from ...tracing.context import TraceContext
from ...tracing.export import Export
from ..reply import Reply
from ..requests.generation import Generation
from .request_log import POLLED, RequestRecord

MAX_CHOICES = 16  # with spans of their own
FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
DURATION = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
Attributes = dict[str, Any]


@dataclass(slots=True)
class RequestSpan:
    """``began_ns``: when the request came, in nanoseconds since 1970."""

    span: Span
    context: TraceContext
    began_ns: int


class RequestSpans:
    """Begins and ends the spans of one frontend's requests, and owns their export. ``endpoint`` and
    ``lost`` as for ``Export``.
    """

    def __init__(self, endpoint: str, name: str, model: str, lost: Callable[[int], None]) -> None:
        self._model = model
        self._export = Export(endpoint, __version__, name, lost)
        self._tracer = self._export.tracing.get_tracer("lockstep", __version__)
        meter = self._export.metering.get_meter("lockstep", __version__)

        def histogram(metric: str, bounds: tuple[float, ...]) -> Any:
            return meter.create_histogram(metric, "s", explicit_bucket_boundaries_advisory=bounds)

        self._duration = histogram("gen_ai.server.request.duration", DURATION)
        self._first_token = histogram("gen_ai.server.time_to_first_token", FIRST_TOKEN)
        self._per_token = histogram("gen_ai.server.time_per_output_token", PER_TOKEN)

    def close(self) -> None:
        self._export.close()

    def begin(self, record: RequestRecord, caller: TraceContext | None) -> RequestSpan | None:
        """None for a probe: those come every second."""
        if record.path in POLLED:
            return None
        began_ns = time.time_ns() - int((time.monotonic() - record.began) * 1e9)
        span = self._tracer.start_span(
            record.method,
            Context() if caller is None else _below(caller),
            SpanKind.SERVER,
            {
                "http.request.method": record.method,
                "url.path": record.plain_path,
                "url.scheme": "http",
                "lockstep.request_id": record.id,
            },
            start_time=began_ns,
        )
        own = span.get_span_context()
        if not own.is_valid:  # OTEL_SDK_DISABLED
            return None
        context = TraceContext(f"{own.trace_id:032x}", f"{own.span_id:016x}", own.trace_flags.sampled)
        return RequestSpan(span, context, began_ns)

    def end(self, traced: RequestSpan, record: RequestRecord, route: str) -> None:
        span, reply = traced.span, record.reply
        now = time.monotonic()
        if reply is not None:
            self._measure(record, reply, now)
        if not span.is_recording():  # sampled out
            return
        if route != "none":
            span.update_name(f"{record.method} {route}")
            span.set_attribute("http.route", route)
        if record.status:
            span.set_attribute("http.response.status_code", record.status)
        if reply is not None:
            span.set_attributes(_generated(reply, self._model))
            times = _Times(record.began, traced.began_ns)
            below = trace.set_span_in_context(span, Context())
            for generation in reply.generations[:MAX_CHOICES]:
                self._phases(generation, below, times, now)
        if error := _error(record):
            span.set_attribute("error.type", error)
            if error != "client_gone":
                span.set_status(StatusCode.ERROR, record.why_refused or None)
        span.end(traced.began_ns + int((now - record.began) * 1e9))

    def _phases(self, generation: Generation, below: Context, times: _Times, now: float) -> None:
        """The phases of a choice. An unfinished phase ends with the request; phases that were not
        reached are left out.
        """
        if not generation.submitted:
            return
        started = generation.started or generation.first
        facts: Attributes = {
            "lockstep.choice": generation.index,
            "lockstep.engine_id": generation.submit.request_id,
        }
        run: Attributes = {"gen_ai.usage.cache_read.input_tokens": generation.num_cached}
        if generation.runs:
            run |= {"lockstep.data": generation.runs[0].data, "lockstep.epoch": generation.runs[0].epoch}
        self._phase("queue", below, times(generation.submitted), times(started or now), facts)
        if started:
            self._phase("prefill", below, times(started), times(generation.first or now), facts | run)
        if not generation.first:
            return
        again = [(times(stay.at), stay) for stay in generation.runs[1:]]
        facts |= {
            "gen_ai.usage.output_tokens": len(generation.tokens),
            "lockstep.preemptions": generation.num_preemptions,
        }
        end = times(generation.last)
        span = self._tracer.start_span("decode", below, attributes=facts, start_time=times(generation.first))
        for at, stay in again:
            told = {"lockstep.data": stay.data, "lockstep.epoch": stay.epoch}
            span.add_event("started again", told, at)
        span.end(end)

    def _phase(self, name: str, below: Context, start: int, end: int, facts: Attributes) -> None:
        self._tracer.start_span(name, below, attributes=facts, start_time=start).end(end)

    def _measure(self, record: RequestRecord, reply: Reply, now: float) -> None:
        labels: Attributes = {
            "gen_ai.operation.name": _operation(reply),
            "gen_ai.provider.name": "lockstep",
            "gen_ai.request.model": reply.outline.model,
        }
        error = _error(record)
        self._duration.record(now - record.began, labels | ({"error.type": error} if error else {}))
        if error:
            return
        first = [item for item in reply.generations if item.first]
        if first:
            self._first_token.record(min(item.first for item in first) - record.began, labels)
        for item in first:
            if len(item.tokens) > 1:
                self._per_token.record((item.last - item.first) / (len(item.tokens) - 1), labels)


@dataclass(frozen=True, slots=True)
class _Times:
    """Nanoseconds since 1970 of a time of the monotonic clock."""

    began: float
    began_ns: int

    def __call__(self, at: float) -> int:
        return self.began_ns + int((at - self.began) * 1e9)


def _below(caller: TraceContext) -> Context:
    state = TraceState.from_header([caller.state]) if caller.state else None
    flags = TraceFlags(TraceFlags.SAMPLED if caller.sampled else TraceFlags.DEFAULT)
    parent = SpanContext(int(caller.trace_id, 16), int(caller.span_id, 16), True, flags, state)
    return trace.set_span_in_context(NonRecordingSpan(parent), Context())


def _operation(reply: Reply) -> str:
    return "chat" if reply.outline.chat else "text_completion"


def _error(record: RequestRecord) -> str:
    """``error.type`` of a request; empty for one that was answered, or refused with 4xx."""
    reply = record.reply
    generations = [] if reply is None else reply.generations
    if reply is not None and reply.error is not None and reply.error.status_code >= 500:
        return str(reply.error.status_code)
    if record.status >= 500:
        return str(record.status)
    gone = reply is not None and reply.gone.done()
    left = gone and any(item.finish in (None, "abort") for item in generations)
    return "client_gone" if left or record.status in (0, 499) else ""


def _generated(reply: Reply, model: str) -> Attributes:
    generations, usage = reply.generations, reply.usage()
    sampling = generations[0].submit.sampling
    facts: Attributes = {
        "gen_ai.operation.name": _operation(reply),
        "gen_ai.provider.name": "lockstep",
        "gen_ai.request.model": reply.outline.model,
        "gen_ai.request.max_tokens": generations[0].max_tokens,
        "gen_ai.request.choice.count": len(generations),
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
        "gen_ai.request.presence_penalty": sampling.presence_penalty,
        "gen_ai.response.model": model,
        "gen_ai.response.id": reply.outline.id,
        "gen_ai.response.finish_reasons": [item.finish_reason or "abort" for item in generations],
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": usage["completion_tokens"],
        "gen_ai.usage.cache_read.input_tokens": usage["prompt_tokens_details"]["cached_tokens"],
        "gen_ai.usage.reasoning.output_tokens": usage["completion_tokens_details"]["reasoning_tokens"],
    }
    if sampling.top_k:
        facts["gen_ai.request.top_k"] = sampling.top_k
    return facts
