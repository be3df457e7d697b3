"""POST /admin/timeline: asks the controller, and answers with what comes, in time."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import httpx
import pytest

from lockstep.engine.frontend import timelines
from lockstep.engine.protocol.timeline import AskTimeline, StepSpans, TimelineEnd
from support.engine.chrome_trace import check_trace, spans_of
from support.engine.frontend.running_frontend import RunningFrontend, wait_until
from support.engine.frontend.scripted_controller import say
from support.engine.text.tiny_tokenizer import IM_END, write_model

ADMIN = {"Authorization": "Bearer root"}
SPANS = StepSpans(0, 1, 5, 10.0, 10.5, "clock")


@pytest.fixture(scope="module")
def frontend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningFrontend]:
    model = write_model(tmp_path_factory.mktemp("model"))
    with RunningFrontend(model, say([IM_END]), admin_key="root") as running:
        yield running


class Asking:
    """A request in a thread, once the controller has heard of it."""

    def __init__(self, frontend: RunningFrontend, **body: object) -> None:
        self._frontend, self._answers = frontend, []  # type: ignore[var-annotated]
        asked = len(frontend.engine.timelines)
        self._thread = threading.Thread(target=self._ask, args=(body,), daemon=True)
        self._thread.start()
        wait_until(lambda: len(frontend.engine.timelines) > asked, "the controller is asked")
        self.asked: AskTimeline = frontend.engine.timelines[-1]

    def _ask(self, body: object) -> None:
        with httpx.Client(base_url=self._frontend.url, timeout=30) as http:
            self._answers.append(http.post("/admin/timeline", json=body, headers=ADMIN))

    def answer(self) -> httpx.Response:
        self._thread.join(30)
        [answer] = self._answers
        return answer


def test_it_is_a_trace(frontend: RunningFrontend) -> None:
    asking = Asking(frontend, steps=3, seconds=5)
    assert (asking.asked.steps, asking.asked.seconds) == (3, 5.0)
    frontend.engine.send(SPANS)
    frontend.engine.send(TimelineEnd(asking.asked.id - 1, "of an ask before"))
    frontend.engine.send(TimelineEnd(asking.asked.id, "epoch 2 began"))
    answer = asking.answer()
    assert answer.status_code == 200
    check_trace(answer.json())
    assert [event["name"] for event in spans_of(answer.json(), 1, 0)] == ["step 5"]
    assert answer.json()["otherData"]["reason"] == "epoch 2 began"


def test_it_needs_the_admin_key_and_numbers_within_bounds(frontend: RunningFrontend) -> None:
    asked = len(frontend.engine.timelines)
    for headers in ({}, {"Authorization": "Bearer no"}):
        assert frontend.http.post("/admin/timeline", json={}, headers=headers).status_code == 401
    for body in ({"steps": 0}, {"steps": 513}, {"seconds": 61}, {"seconds": 0}, {"stpes": 1}, []):
        answer = frontend.http.post("/admin/timeline", json=body, headers=ADMIN)
        assert answer.status_code == 400, body
    assert len(frontend.engine.timelines) == asked


def test_one_at_a_time_and_refusals_of_the_controller(frontend: RunningFrontend) -> None:
    asking = Asking(frontend)
    answer = frontend.http.post("/admin/timeline", headers=ADMIN)
    assert answer.status_code == 409 and "Another timeline" in answer.json()["error"]["message"]
    frontend.engine.send(TimelineEnd(asking.asked.id, "ranks are loading", 503))
    answer = asking.answer()
    assert answer.status_code == 503 and answer.json()["error"]["message"] == "ranks are loading"


@pytest.mark.parametrize("heard", [False, True])
def test_a_controller_that_says_nothing_more_is_not_waited_for(
    heard: bool, frontend: RunningFrontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timelines, "PATIENCE", 1.0)
    asking = Asking(frontend, seconds=0.1)
    if heard:
        frontend.engine.send(SPANS)
    answer = asking.answer()
    assert answer.status_code == (200 if heard else 503)
    assert "the controller did not end the timeline within 1.1 s" in answer.text
