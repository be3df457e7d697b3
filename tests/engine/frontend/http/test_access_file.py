"""The file of JSON lines, one for each request, and its disk."""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from lockstep.engine.frontend.http import line_file
from lockstep.engine.frontend.http.line_file import LineFile
from support.engine.frontend.running_frontend import RunningFrontend, wait_until
from support.engine.frontend.scripted_controller import say
from support.engine.text.tiny_tokenizer import IM_END, write_model

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "the secret word"}]}
SCRIPT = say([5, 6, 7, IM_END])
TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "access.jsonl"


@pytest.fixture
def frontend(folder: Path, file: Path) -> Iterator[RunningFrontend]:
    with RunningFrontend(folder, SCRIPT, admin_key="a1", access_log_file=str(file)) as running:
        yield running


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def line_of(file: Path, id: str) -> dict[str, Any]:
    wait_until(lambda: any(line["id"] == id for line in lines(file)), f"the line of {id}")
    [line] = [line for line in lines(file) if line["id"] == id]
    return line


def test_a_request_leaves_one_line_with_the_id_that_its_story_has(
    frontend: RunningFrontend, file: Path
) -> None:
    headers = {"X-Request-Id": "one", "traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
    answer = frontend.http.post(CHAT + "?key=hidden", json=BODY, headers=headers)
    line = line_of(file, "one")
    wanted = {
        "trace_id": TRACE,
        "method": "POST",
        "path": CHAT,
        "status": 200,
        "model": "tiny",
        "choices": 1,
        "completion_tokens": 4,
        "prompt_tokens": answer.json()["usage"]["prompt_tokens"],
        "finish": ["stop"],
    }
    assert line.items() >= wanted.items()
    assert 0 <= line["queue_seconds"] <= line["first_token_seconds"] <= line["seconds"]
    story = frontend.http.get("/admin/requests/one", headers={"Authorization": "Bearer a1"}).json()
    assert abs(story["seconds"] - line["seconds"]) < 1
    text = file.read_text()
    assert "secret" not in text and "hidden" not in text
    assert answer.json()["choices"][0]["message"]["content"] not in text
    assert "traceparent" not in answer.headers  # nobody traces


def test_refused_and_abandoned_requests_and_unknown_paths_have_lines_but_probes_none(
    frontend: RunningFrontend, file: Path
) -> None:
    frontend.http.get("/health")
    frontend.http.post(CHAT, json={"messages": "the secret word"}, headers={"X-Request-Id": "bad"})
    frontend.http.get("/nowhere/else", headers={"X-Request-Id": "lost"})
    frontend.engine.script = say([5, 6])  # and then silence
    with frontend.http.stream(
        "POST", CHAT, json=BODY | {"stream": True}, headers={"X-Request-Id": "gone"}
    ) as answer:
        text = ""
        for line in answer.iter_lines():
            if line:
                text += json.loads(line.removeprefix("data: "))["choices"][0]["delta"]["content"]
            if text == "#$":
                break
    bad, lost, gone = (line_of(file, id) for id in ("bad", "lost", "gone"))
    assert bad["status"] == 400 and "messages" in bad["refusal"] and "secret" not in bad["refusal"]
    assert (lost["status"], lost["trace_id"]) == (404, None)
    assert (gone["finish"], gone["completion_tokens"]) == (["abort"], 2)
    assert [line for line in lines(file) if line["path"] == "/health"] == []


def test_a_file_that_was_renamed_is_made_anew(frontend: RunningFrontend, file: Path) -> None:
    frontend.http.get("/version", headers={"X-Request-Id": "before"})
    line_of(file, "before")
    file.rename(file.with_suffix(".1"))
    frontend.http.get("/version", headers={"X-Request-Id": "after"})
    assert line_of(file, "after")["status"] == 200
    assert [line["id"] for line in lines(file.with_suffix(".1"))][-1] == "before"


def test_lines_of_several_frontends_stay_whole(folder: Path, file: Path) -> None:
    with RunningFrontend(folder, SCRIPT, processes=2, access_log_file=str(file)) as running:
        clients = [httpx.Client(base_url=running.url) for _ in range(4)]
        with ThreadPoolExecutor(4) as threads:
            for number, http in enumerate(clients * 25):
                threads.submit(http.get, "/version", headers={"X-Request-Id": f"{number}-" + "x" * 90})
        for http in clients:
            http.close()
    assert sorted(int(line["id"].partition("-")[0]) for line in lines(file)) == list(range(100))


def test_lines_that_cannot_be_written_are_counted_and_said_once(folder: Path, tmp_path: Path) -> None:
    with RunningFrontend(folder, SCRIPT, access_log_file=str(tmp_path / "no" / "file")) as running:
        for _ in range(3):
            assert running.http.post(CHAT, json=BODY).status_code == 200
        counter = 'lockstep:dropped_records_total{kind="access_log_line"} 3.0'
        wait_until(lambda: counter in running.http.get("/metrics").text, "3 dropped lines")


class Disk:
    """``os.write`` of a disk with ``room`` bytes."""

    def __init__(self, room: int) -> None:
        self.room = room
        self._write = os.write

    def write(self, descriptor: int, data: memoryview) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = self._write(descriptor, data[: self.room])
        self.room -= taken
        return taken


def test_after_a_full_disk_every_line_is_whole_again(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk = Disk(room=25)  # the first line has 10 bytes, the third is torn
    monkeypatch.setattr(line_file.os, "write", disk.write)
    lost: list[int] = []
    with caplog.at_level(logging.INFO, "lockstep.frontend"):
        writer = LineFile(str(file), lost.append)
        for number in range(100, 105):
            writer.put({"id": number})
        wait_until(lambda: sum(lost) == 3, "3 lost lines")
        disk.room = 10**6
        writer.put({"id": 200})
        writer.close()
    whole, torn = [], []
    for text in file.read_text().splitlines():
        try:
            whole.append(json.loads(text)["id"])
        except ValueError:
            torn.append(text)
    assert (whole, len(torn)) == ([100, 101, 200], 1)
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and "No space left" in warnings[0].getMessage()


def test_a_disk_that_hangs_holds_a_bounded_number_of_lines_and_no_caller(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, freed = threading.Event(), threading.Event()
    write = os.write

    def hang(descriptor: int, data: memoryview) -> int:
        reached.set()
        assert freed.wait(60)
        return write(descriptor, data)

    monkeypatch.setattr(line_file.os, "write", hang)
    monkeypatch.setattr(line_file, "CLOSE_SECONDS", 0.05)
    lost: list[int] = []
    writer = LineFile(str(file), lost.append)
    writer.put({"id": 0})
    assert reached.wait(60)
    for number in range(line_file.MAX_WAITING + 5):
        writer.put({"id": number})
    assert sum(lost) == 5
    writer.close()
    assert sum(lost) == 5 + line_file.MAX_WAITING
    freed.set()
