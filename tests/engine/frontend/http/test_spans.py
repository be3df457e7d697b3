"""Spans of requests, as a collector gets them over OTLP/HTTP; and requests without a collector."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

pytest.importorskip("opentelemetry.sdk", reason="needs the extra otel")
pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs the extra otel")

from opentelemetry import trace as trace_api
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from lockstep.engine.protocol.frontends import Rejected
from lockstep.engine.protocol.message import Finish
from support.engine.frontend.otlp_collector import OtlpCollector, values
from support.engine.frontend.running_frontend import RunningFrontend, wait_until
from support.engine.frontend.scripted_controller import say
from support.engine.text.tiny_tokenizer import IM_END, write_model

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "the secret word"}]}
SCRIPT = say([5, 6, 7, IM_END])
CALLER_SPAN = "b7ad6b7169203331"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        patch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "200")
        patch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
        patch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-key=k7")
        patch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
        yield


@pytest.fixture(scope="module")
def collector() -> Iterator[OtlpCollector]:
    with OtlpCollector() as running:
        yield running


@pytest.fixture(scope="module")
def frontend(folder: Path, collector: OtlpCollector, environment: None) -> Iterator[RunningFrontend]:
    with RunningFrontend(folder, SCRIPT, tracing=collector.url) as running:
        yield running


@pytest.fixture
def scripted(frontend: RunningFrontend) -> Iterator[RunningFrontend]:
    """The frontend, for a test that changes its script."""
    yield frontend
    frontend.engine.script = SCRIPT


def caller(number: int, sampled: bool = True) -> tuple[str, dict[str, str]]:
    trace = f"{number:032x}"
    return trace, {"traceparent": f"00-{trace}-{CALLER_SPAN}-{int(sampled):02x}"}


def spans_of(collector: OtlpCollector, trace: str) -> dict[str, Any]:
    """The spans of a trace by name, once the server's own has come, which is the last to end."""

    def found() -> list[Any]:
        return [span for span in list(collector.spans) if span.trace_id.hex() == trace]

    wait_until(lambda: any(span.kind == span.SPAN_KIND_SERVER for span in found()), f"the spans of {trace}")
    return {span.name: span for span in found()}


def dropped(frontend: RunningFrontend) -> float:
    found = re.search(
        r'lockstep:dropped_records_total\{kind="span"\} (.*)', frontend.http.get("/metrics").text
    )
    assert found is not None
    return float(found[1])


def test_a_request_has_a_span_below_its_caller_and_one_for_each_phase(
    frontend: RunningFrontend, collector: OtlpCollector
) -> None:
    before = time.time_ns()
    trace, headers = caller(1)
    answer = frontend.http.post(CHAT, json=BODY, headers=headers | {"X-Request-Id": "first"})
    spans = spans_of(collector, trace)
    server = spans.pop(f"POST {CHAT}")
    assert server.parent_span_id.hex() == CALLER_SPAN
    assert answer.headers["traceparent"] == f"00-{trace}-{server.span_id.hex()}-01"
    usage = answer.json()["usage"]
    wanted = {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.id": answer.json()["id"],
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": 4,
        "http.route": CHAT,
        "http.response.status_code": 200,
        "lockstep.request_id": "first",
    }
    assert values(server.attributes).items() >= wanted.items()
    assert server.status.code == server.status.STATUS_CODE_UNSET
    assert sorted(spans) == ["decode", "prefill", "queue"]
    assert {span.parent_span_id for span in spans.values()} == {server.span_id}
    queue, prefill, decode = spans["queue"], spans["prefill"], spans["decode"]
    assert queue.end_time_unix_nano == prefill.start_time_unix_nano
    assert prefill.end_time_unix_nano == decode.start_time_unix_nano
    times = [server.start_time_unix_nano, queue.start_time_unix_nano, decode.start_time_unix_nano]
    times += [decode.end_time_unix_nano, server.end_time_unix_nano]
    assert times == sorted(times) and before - 10**9 <= times[0] <= times[-1] <= time.time_ns() + 10**9
    assert values(prefill.attributes)["lockstep.epoch"] == 1
    text = str([server, *spans.values()])
    assert "secret" not in text and answer.json()["choices"][0]["message"]["content"] not in text
    assert collector.headers[-1]["x-key"] == "k7"
    own = {"service.name": "lockstep", "deployment.environment.name": "test"}
    assert collector.resources[-1].items() >= own.items()


def test_a_request_without_a_caller_begins_a_trace(
    frontend: RunningFrontend, collector: OtlpCollector
) -> None:
    for headers in ({}, {"traceparent": "nonsense"}):
        answer = frontend.http.post("/v1/completions", json={"prompt": "a", "n": 2}, headers=headers)
        found = re.fullmatch("00-([0-9a-f]{32})-([0-9a-f]{16})-01", answer.headers["traceparent"])
        assert found is not None
        server = spans_of(collector, found[1])["POST /v1/completions"]
        assert not server.parent_span_id
        assert values(server.attributes)["gen_ai.operation.name"] == "text_completion"
        assert values(server.attributes)["gen_ai.request.choice.count"] == 2


def test_a_caller_that_is_sampled_out_costs_no_span(
    frontend: RunningFrontend, collector: OtlpCollector
) -> None:
    out, headers = caller(2, sampled=False)
    answer = frontend.http.post(CHAT, json=BODY, headers=headers)
    assert re.fullmatch(f"00-{out}-[0-9a-f]{{16}}-00", answer.headers["traceparent"])
    trace, headers = caller(3)
    frontend.http.post(CHAT, json=BODY, headers=headers)
    spans_of(collector, trace)  # a later request's have come
    assert [span for span in collector.spans if span.trace_id.hex() == out] == []


def test_a_stream_is_traced_to_its_last_token(frontend: RunningFrontend, collector: OtlpCollector) -> None:
    trace, headers = caller(4)
    with frontend.http.stream("POST", CHAT, json=BODY | {"stream": True}, headers=headers) as answer:
        assert trace in answer.headers["traceparent"]
        answer.read()
    spans = spans_of(collector, trace)
    assert values(spans["decode"].attributes)["gen_ai.usage.output_tokens"] == 4
    assert "error.type" not in values(spans[f"POST {CHAT}"].attributes)


def test_a_client_that_goes_away_ends_the_spans(scripted: RunningFrontend, collector: OtlpCollector) -> None:
    scripted.engine.script = say([5, 6])  # and then silence
    trace, headers = caller(5)
    with scripted.http.stream("POST", CHAT, json=BODY | {"stream": True}, headers=headers) as answer:
        next(answer.iter_lines())
    server = spans_of(collector, trace)[f"POST {CHAT}"]
    facts = values(server.attributes)
    assert (facts["error.type"], facts["gen_ai.response.finish_reasons"]) == ("client_gone", ["abort"])
    assert server.status.code == server.status.STATUS_CODE_UNSET


@pytest.mark.parametrize(
    "item, status, phases",
    [
        (Rejected(0, 503, "the queue is full"), 503, {"queue"}),
        (Finish.ERROR, 500, {"queue", "prefill"}),
    ],
)
def test_an_error_of_ours_marks_the_span(
    item: Any, status: int, phases: set[str], scripted: RunningFrontend, collector: OtlpCollector
) -> None:
    scripted.engine.script = lambda submit: [item]
    trace, headers = caller(100 + status)
    assert scripted.http.post(CHAT, json=BODY, headers=headers).status_code == status
    spans = spans_of(collector, trace)
    server = spans.pop(f"POST {CHAT}")
    assert values(server.attributes)["error.type"] == str(status)
    assert server.status.code == server.status.STATUS_CODE_ERROR
    assert spans.keys() <= phases


def test_an_error_of_the_client_leaves_the_status_open(
    frontend: RunningFrontend, collector: OtlpCollector
) -> None:
    trace, headers = caller(6)
    frontend.http.post(CHAT, json={"messages": "the secret word"}, headers=headers)
    [server] = spans_of(collector, trace).values()
    assert values(server.attributes)["http.response.status_code"] == 400
    assert server.status.code == server.status.STATUS_CODE_UNSET and "secret" not in str(server)


def test_a_probe_has_no_span(frontend: RunningFrontend, collector: OtlpCollector) -> None:
    assert "traceparent" not in frontend.http.get("/health").headers
    trace, headers = caller(7)
    frontend.http.get("/version", headers=headers)
    assert list(spans_of(collector, trace)) == ["GET /version"]


def test_metrics_of_the_server_come_too(frontend: RunningFrontend, collector: OtlpCollector) -> None:
    frontend.http.post(CHAT, json=BODY)
    names = {"request.duration", "time_to_first_token", "time_per_output_token"}
    wanted = {f"gen_ai.server.{name}" for name in names}
    wait_until(lambda: wanted <= collector.metrics.keys(), "metrics")
    points = collector.metrics["gen_ai.server.time_to_first_token"].histogram.data_points
    chats = [point for point in points if values(point.attributes)["gen_ai.operation.name"] == "chat"]
    assert chats and chats[0].count >= 1


def test_without_a_collector_requests_are_served_and_the_loss_is_counted_and_said_once(
    folder: Path, environment: None, caplog: pytest.LogCaptureFixture
) -> None:
    with OtlpCollector() as closed:
        url = closed.url
    with (
        caplog.at_level(logging.INFO, "lockstep.tracing"),
        RunningFrontend(folder, SCRIPT, tracing=url) as running,
    ):
        for number in (4, 8, 12):  # in batches of their own
            assert running.http.post(CHAT, json=BODY).status_code == 200
            wait_until(lambda: dropped(running) == number, f"{number} dropped spans")  # noqa: B023
    warnings = [item for item in caplog.records if item.levelno >= logging.WARNING]
    said = [item.getMessage() for item in warnings]
    assert sum("takes no spans" in text for text in said) == 1 and len(set(said)) == len(said), said
    assert {item.name for item in warnings} == {"lockstep.tracing"}


def test_a_collector_that_hangs_delays_nobody_and_holds_a_bounded_number_of_spans(
    folder: Path, environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "8")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "60")
    with OtlpCollector() as collector:
        collector.answers.clear()
        with RunningFrontend(folder, SCRIPT, tracing=collector.url) as running:
            assert running.http.post(CHAT, json=BODY).status_code == 200
            assert collector.asked.wait(60)  # four spans hang, eight may wait
            for _ in range(4):
                assert running.http.post(CHAT, json=BODY).status_code == 200
            wait_until(lambda: dropped(running) == 8, "8 dropped spans")
            began = time.monotonic()
        assert time.monotonic() - began < 30  # not the minute that the exporter has
        collector.answers.set()


def test_a_disabled_sdk_traces_nothing(
    folder: Path, environment: None, monkeypatch: pytest.MonkeyPatch, collector: OtlpCollector
) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    with RunningFrontend(folder, SCRIPT, tracing=collector.url) as running:
        answer = running.http.post(CHAT, json=BODY)
        assert answer.status_code == 200 and "traceparent" not in answer.headers


def test_spans_are_sent_before_the_frontend_leaves(
    folder: Path, environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "60000")
    with OtlpCollector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        with RunningFrontend(folder, SCRIPT, tracing="") as running:
            running.http.post(CHAT, json=BODY)
            assert collector.spans == []
        assert len(collector.spans) == 4


def test_a_web_framework_that_traces_by_itself_adds_nothing(
    frontend: RunningFrontend, collector: OtlpCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    monkeypatch.setattr(trace_api, "_TRACER_PROVIDER", provider)
    trace, headers = caller(9)
    frontend.http.post(CHAT, json={"messages": "the secret word"}, headers=headers)
    assert len(spans_of(collector, trace)) == 1 and not kept.get_finished_spans()


def test_without_tracing_no_line_of_it_runs(folder: Path) -> None:
    """Two requests whose callers are traced, one of them a stream. FastAPI itself reads a variable
    of OpenTelemetry's context, where that is installed.
    """
    called: set[str] = set()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        called.add(frame.f_code.co_filename)

    threading.setprofile(note)
    try:
        with RunningFrontend(folder, SCRIPT) as running:
            for stream in (False, True):
                answer = running.http.post(CHAT, json=BODY | {"stream": stream}, headers=caller(11)[1])
                assert answer.status_code == 200 and "traceparent" not in answer.headers
    finally:
        threading.setprofile(None)
    assert any(name.endswith("http/access.py") for name in called), "the frontend was watched"
    ours = ("lockstep/engine/tracing/context.py", "http/spans.py", "tracing/export.py", "http/line_file.py")
    assert not [
        name for name in called if name.endswith(ours) or re.search("/opentelemetry/(?!context/)", name)
    ]


def test_without_tracing_nothing_is_imported() -> None:
    code = (
        "import sys, lockstep.engine.frontend.process, lockstep.engine.frontend.http.observers as o\n"
        "class Spec: access_log_file = tracing = None\n"
        "assert o.observe(Spec, None) is None\n"
        "ours = ('opentelemetry.sdk', 'opentelemetry.exporter', 'lockstep.engine.tracing.export')\n"
        "print([name for name in sys.modules if name.startswith(ours)])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
