"""/admin/requests/{id}: the story of a request, while it runs and afterwards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from lockstep.engine.frontend.http.request_log import RequestRecord
from lockstep.engine.frontend.http.stories import MOST, Stories
from support.engine.frontend.running_frontend import RunningFrontend, wait_until
from support.engine.frontend.scripted_controller import say
from support.engine.text.tiny_tokenizer import IM_END, write_model

ADMIN = {"Authorization": "Bearer a1"}
CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "the secret word"}]}
SCRIPT = say([5, 6, 7, IM_END])


@pytest.fixture(scope="module")
def frontend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningFrontend]:
    folder = write_model(tmp_path_factory.mktemp("model"))
    with RunningFrontend(folder, SCRIPT, admin_key="a1") as running:
        yield running


def ask(frontend: RunningFrontend, id: str, **fields: Any) -> httpx.Response:
    return frontend.http.post(CHAT, json=BODY | fields, headers={"X-Request-Id": id})


def told(frontend: RunningFrontend, id: str) -> httpx.Response:
    return frontend.http.get(f"/admin/requests/{id}", headers=ADMIN)


def ended(frontend: RunningFrontend, id: str) -> dict[str, Any]:
    """The story once it is complete, which is after the answer."""
    wait_until(lambda: told(frontend, id).json().get("ended"), f"the end of {id}")
    story: dict[str, Any] = told(frontend, id).json()
    return story


def test_a_request_that_was_answered_has_one_timeline_a_choice(frontend: RunningFrontend) -> None:
    assert ask(frontend, "two-choices", n=2).status_code == 200
    story = ended(frontend, "two-choices")
    assert (story["status"], story["path"], len(story["choices"])) == (200, CHAT, 2)
    for choice in story["choices"]:
        events = [event["event"] for event in choice["timeline"]]
        assert events == ["submitted", "started", "first token", "last token"]
        seconds = [event["seconds"] for event in choice["timeline"]]
        assert seconds == sorted(seconds) and seconds[0] >= 0 and seconds[-1] <= story["seconds"]
        started = choice["timeline"][1]
        assert (started["data"], started["epoch"], started["preemptions"]) == (0, 1, 0)
        assert (choice["finish"], choice["completion_tokens"], choice["runs"]) == ("stop", 4, 1)


def test_a_story_holds_no_prompt_and_no_answer(frontend: RunningFrontend) -> None:
    answer = ask(frontend, "secrets").json()["choices"][0]["message"]["content"]
    text = json.dumps(ended(frontend, "secrets"))
    assert "secret word" not in text and answer not in text


def test_a_running_request_is_told_of_and_a_stream_too(frontend: RunningFrontend) -> None:
    frontend.engine.script = say([5, 6])  # and then silence
    try:
        with frontend.http.stream("POST", CHAT, json=BODY | {"stream": True}) as answer:
            id = answer.headers["x-request-id"]
            wait_until(lambda: told(frontend, id).json()["choices"][0]["completion_tokens"] == 2, "2 tokens")
            story = told(frontend, id).json()
            assert not story["ended"] and story["choices"][0]["finish"] is None
    finally:
        frontend.engine.script = SCRIPT
    assert ended(frontend, id)["choices"][0]["finish"] == "abort"


@pytest.mark.parametrize("id", ["nobody", "%2e%2e", "x" * 500])
def test_an_unknown_request_is_404_by_name(frontend: RunningFrontend, id: str) -> None:
    answer = told(frontend, id)
    assert answer.status_code == 404 and answer.json()["error"]["message"]


def test_a_refused_request_and_others_have_none(frontend: RunningFrontend) -> None:
    assert ask(frontend, "refused", temperature=9).status_code == 400
    frontend.http.get("/version", headers={"X-Request-Id": "version"})
    assert told(frontend, "refused").status_code == told(frontend, "version").status_code == 404


def test_only_the_admin_key_opens_it(frontend: RunningFrontend) -> None:
    assert frontend.http.get("/admin/requests/any").status_code == 401


def test_the_newest_request_of_an_id_is_told_of(frontend: RunningFrontend) -> None:
    assert ask(frontend, "again").status_code == 200
    ended(frontend, "again")
    assert ask(frontend, "again", n=3).status_code == 200
    wait_until(lambda: len(told(frontend, "again").json()["choices"]) == 3, "the newest")


def test_at_most_so_many_stories_are_kept() -> None:
    class Answered:
        generations: tuple[()] = ()

    stories = Stories(most=3)
    for number in range(5):
        reply: Any = Answered()
        record = RequestRecord(str(number), "POST", b"/", 0.0, 200, reply=reply)
        stories.begin(record)
        stories.end(record)
    assert [number for number in range(5) if stories.find(str(number))] == [2, 3, 4]
    assert MOST * 4096 <= 8 << 20
