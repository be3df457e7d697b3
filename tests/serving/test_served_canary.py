"""``launch canary``, ``launch load`` and ``launch bench`` against a served model that asks for a
key.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from lockstep.launch.client import canary
from lockstep.launch.client.server import Server, ask_json
from lockstep.launch.commands.main import app
from support.launch.launcher import Launcher
from support.serving.random_checkpoint import random_checkpoint
from support.serving.relay import relay

KEY = "key-of-the-tests"
PROMPTS = [
    {"name": "text", "prompt": "The cat sat"},
    {"name": "chat", "messages": [{"role": "user", "content": "Add 2 and 3."}], "max_tokens": 5},
    {"name": "long", "prompt": "To be or not to be. " * 30},
    {"name": "figures", "prompt": "1 2 3 4"},
]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with random weights on one rank."""
    arguments = ("cluster.backend=local", "cluster.ranks_per_node=1", "frontend.port=0")
    model, key = f"model.path={random_checkpoint()}", f"frontend.api_keys=[{KEY}]"
    folder = tmp_path_factory.mktemp("canary") / "run"
    with Launcher(folder, "--recipe", "demo", model, key, *arguments) as launcher:
        yield launcher.url().removesuffix("/v1")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("CANARY_KEY", KEY)
    monkeypatch.setenv("WRONG_KEY", "wrong")

    def run(command: str, against: str, *arguments: object, key: str = "CANARY_KEY") -> Result:
        given = [command, "--against", against, "--api-key-env", key, *map(str, arguments)]
        return CliRunner().invoke(app, given)

    return run


@pytest.fixture(scope="module")
def stored(url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers to ``PROMPTS`` of 8 tokens each, but for the chat."""
    folder = tmp_path_factory.mktemp("answers")
    prompts, answers = folder / "prompts.jsonl", folder / "answers.json"
    prompts.write_text("\n".join(map(json.dumps, PROMPTS)))
    result = CliRunner(env={"CANARY_KEY": KEY}).invoke(
        app,
        f"canary --against {url} --api-key-env CANARY_KEY --save {answers} "
        f"--prompts {prompts} --max-tokens 8",
    )
    assert result.exit_code == 0, result.output
    assert f"{answers}: 4 answers of demo, 29 tokens, server version" in result.stdout
    return answers


def edited(stored: Path, folder: Path, **changes: object) -> Path:
    """A copy in which fields of the second token of the first answer are changed."""
    content = json.loads(stored.read_text())
    content["answers"][0]["tokens"][1].update(changes)
    copy = folder / "edited.json"
    copy.write_text(json.dumps(content))
    return copy


def test_stored_are_the_tokens_and_logprobs_that_the_server_gives(url: str, stored: Path) -> None:
    content = json.loads(stored.read_text())
    assert (content["model"], content["max_tokens"]) == ("demo", 8)
    assert content["version"] == httpx.get(f"{url}/version").json()["version"]
    assert [len(answer["tokens"]) for answer in content["answers"]] == [8, 5, 8, 8]
    body = {"model": "demo", "prompt": "The cat sat", "max_tokens": 8, "temperature": 0, "logprobs": 5}
    body |= {"ignore_eos": True, "return_token_ids": True}
    headers = {"Authorization": f"Bearer {KEY}"}
    asked = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60.0).json()["choices"][0]
    first = content["answers"][0]
    assert [token["id"] for token in first["tokens"]] == asked["token_ids"]
    assert first["prompt_ids"] == asked["prompt_token_ids"]
    told = asked["logprobs"]["token_logprobs"]
    assert [token["logprob"] for token in first["tokens"]] == pytest.approx(told, abs=1e-4)


def test_the_same_server_gives_the_same_answers(url: str, stored: Path, run: Any) -> None:
    result = run("canary", f"{url}/v1", "--answers", stored, "--tolerance", "0.001")
    assert result.exit_code == 0, result.output
    assert "4 prompts: 4 same (--tolerance 0.001)" in result.stdout
    assert "stored: demo, server version" in result.stdout


def test_prompts_are_computed_again_not_taken_from_the_cache(
    url: str, stored: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The long one fills several pages, and has been asked before."""
    cached: list[int] = []

    async def watched(server: Server, method: str, path: str, body: Any = None) -> Any:
        document = await ask_json(server, method, path, body)
        if "usage" in document:
            cached.append(document["usage"]["prompt_tokens_details"]["cached_tokens"])
        return document

    monkeypatch.setattr(canary, "ask_json", watched)
    assert run("canary", url, "--answers", stored).exit_code == 0
    assert cached == [0, 0, 0, 0]


def test_packaged_prompts_are_answered(url: str, run: Any, tmp_path: Path) -> None:
    file = tmp_path / "answers.json"
    result = run("canary", url, "--save", file, "--max-tokens", "2")
    assert result.exit_code == 0, result.output
    assert f"{file}: 12 answers of demo, 24 tokens" in result.stdout
    assert "12 prompts: 12 same" in run("canary", url, "--answers", file).stdout


def test_an_edited_token_is_found(url: str, stored: Path, run: Any, tmp_path: Path) -> None:
    result = run("canary", url, "--answers", edited(stored, tmp_path, id=1000, token="edited"))
    assert result.exit_code == 1, result.output
    assert "text: differs first at token 2: stored 'edited' (id 1000)" in result.stdout
    assert "4 prompts: 3 same, 1 tokens differ" in result.stdout


def test_an_edited_logprob_is_found(url: str, stored: Path, run: Any, tmp_path: Path) -> None:
    file = edited(stored, tmp_path, logprob=-9.0)
    result = run("canary", url, "--answers", file)
    assert result.exit_code == 1, result.output
    assert "4 prompts: 3 same, 1 logprobs differ" in result.stdout
    assert run("canary", url, "--answers", file, "--tolerance", "100").exit_code == 0


def test_a_near_tie_is_no_difference(url: str, stored: Path, run: Any, tmp_path: Path) -> None:
    """The second likeliest token stands stored in place of the first, with a generous tolerance."""
    token = json.loads(stored.read_text())["answers"][0]["tokens"][1]
    other = next(each for each in token["alternatives"] if each[0] != token["token"])
    gap = token["logprob"] - other[1]
    file = edited(stored, tmp_path, id=1000, token=other[0], logprob=other[1])
    result = run("canary", url, "--answers", file, "--tolerance", gap + 0.01)
    assert result.exit_code == 0, result.output
    assert "4 prompts: 3 same, 1 near tie" in result.stdout
    assert run("canary", url, "--answers", file, "--tolerance", gap / 2).exit_code == 1


def test_a_wrong_key_is_refused_by_name(url: str, stored: Path, run: Any) -> None:
    result = run("canary", url, "--answers", stored, key="WRONG_KEY")
    assert result.exit_code == 2
    assert "GET /v1/models: HTTP 401:" in result.stderr
    assert "--api-key-env" in result.stderr


def test_a_model_that_is_not_served_is_refused(url: str, stored: Path, run: Any) -> None:
    result = run("canary", url, "--answers", stored, "--model", "other")
    assert result.exit_code == 2
    assert f"--model other: {url} serves demo" in result.stderr


def test_a_prompt_that_is_refused_is_named(url: str, run: Any, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"name": "big", "prompt": "word " * 9000}))
    result = run("canary", url, "--save", tmp_path / "x", "--prompts", prompts)
    assert result.exit_code == 2
    assert "prompt 'big': " in result.stderr
    assert "maximum context length" in result.stderr


def test_a_server_that_goes_away_leaves_what_was_compared(url: str, stored: Path, run: Any) -> None:
    port = int(url.rpartition(":")[2])
    with relay(port, connections=4) as through:  # models, version, two prompts
        result = run("canary", through, "--answers", stored)
    assert result.exit_code == 3, result.output
    assert "2 prompts: 2 same" in result.stdout
    assert "stopped early: 2 of 4 prompts were answered" in result.stderr
    assert "prompt 'long': " in result.stderr


def trace_of(folder: Path, *requests: tuple[float, int, int, list[int]]) -> Path:
    """Requests of (milliseconds, prompt tokens, answer tokens, block ids)."""
    file = folder / "trace.jsonl"
    names = ("timestamp", "input_length", "output_length", "hash_ids")
    file.write_text("\n".join(json.dumps(dict(zip(names, each, strict=True))) for each in requests))
    return file


def test_traffic_has_the_lengths_and_prefixes_of_the_trace(url: str, run: Any, tmp_path: Path) -> None:
    shared = [1, 2, 3]
    trace = trace_of(tmp_path, (0, 200, 4, [*shared, 4]), (1500, 200, 3, [*shared, 5]), (1600, 70, 1, [6, 7]))
    result = run("load", url, "--trace", trace, "--block", "64", "--speed", "1.5", "--json")
    assert result.exit_code == 0, result.output
    measured = json.loads(result.stdout)["measured"]
    assert (measured["finished"], measured["failed"], measured["complete"]) == (3, 0, True)
    assert (measured["input_tokens"], measured["output_tokens"]) == (470, 8)
    assert (measured["measured_input_tokens"], measured["cached_tokens"]) == (470, 192)
    assert measured["seconds"] > 1.6 / 1.5
    assert 0 < measured["time_to_first_token"]["p50"] < 60
    assert 0 < measured["time_between_tokens"]["p50"] < 60


def test_measured_stands_beside_simulated(url: str, run: Any) -> None:
    trace = "poisson:rate=50,input=40,output=6,count=20"
    result = run("load", url, "--trace", trace, "--recipe", "demo", "--max-open", "3")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    for name in ("time to first token", "time between tokens"):
        [place] = [number for number, line in enumerate(lines) if name in line]
        assert len(lines[place].replace(name, "").split()) == 6, "three figures with units"
        assert lines[place + 1].split()[0] == "simulated"
        assert len(lines[place + 1].split()) == 7
    [finished] = [line.split() for line in lines if "requests finished" in line]
    assert finished[-2:] == ["20", "20"]
    assert "20 of 20 requests sent" in result.stdout


def test_errors_are_counted_by_kind_and_end_nothing(url: str, run: Any, tmp_path: Path) -> None:
    trace = trace_of(tmp_path, (0, 5000, 4, []), (1, 20, 3, []), (2, 6000, 4, []))
    result = run("load", url, "--trace", trace)
    assert result.exit_code == 1, result.output
    assert "2 failed, HTTP 400:" in result.stdout
    assert "maximum context length" in result.stdout


def test_traffic_with_a_wrong_key_is_refused(url: str, run: Any) -> None:
    trace = "poisson:rate=50,input=40,output=6,count=20"
    result = run("load", url, "--trace", trace, key="WRONG_KEY")
    assert result.exit_code == 2
    assert "GET /v1/models: HTTP 401:" in result.stderr


def test_traffic_to_a_server_that_goes_away_is_counted(url: str, run: Any, tmp_path: Path) -> None:
    trace = trace_of(tmp_path, *((number * 10, 20, 3, []) for number in range(5)))
    with relay(int(url.rpartition(":")[2]), connections=4) as through:  # two before the trace
        result = run("load", through, "--trace", trace, "--max-open", "1", "--json")
    assert result.exit_code == 1, result.output
    measured = json.loads(result.stdout)["measured"]
    assert (measured["finished"], measured["failed"]) == (2, 3)
    assert set(measured["errors"]) <= {"no connection", "cut off"}


def test_a_benchmark_counts_the_tokens_asked(url: str, tmp_path: Path) -> None:
    """Prompts of 64 tokens, 48 of them shared: three pages that a cache may have. The server stands
    under both names.
    """
    options = f"--concurrency 2 --requests 4 --rounds 2 --input 64 --shared 0.75 --output 6 --out {tmp_path}"
    keys = "--api-key-env CANARY_KEY --against-key-env CANARY_KEY"
    recipe = f"--recipe demo cluster.ranks_per_node=1 model.path={random_checkpoint()}"
    arguments = f"bench --url {url} --against {url}/v1 {keys} {options} {recipe} --json".split()
    result = CliRunner(env={"CANARY_KEY": KEY}).invoke(app, arguments)
    assert result.exit_code == 0, result.output
    ours, theirs = json.loads(result.stdout)
    for row in (ours, theirs):
        assert (row["finished"], row["failed"], row["short_answers"]) == (8, 0, 0)
        assert row["answers_without_usage"] == 0
        assert 2 * 48 <= row["cached_tokens"] <= 8 * 48, "all but the first two of each round at least"
        assert 0 < row["ttft_p50_ms"] <= row["e2e_p50_ms"]
    assert ours["version"] == httpx.get(f"{url}/version").json()["version"]
    assert ours["limit_tpot_ms"] > 0 and theirs["limit_tpot_ms"] is None
    assert ours["ratio_output_tokens_per_s"] > 0
    for line in (tmp_path / "requests.jsonl").read_text().splitlines():
        request = json.loads(line)
        assert request["tokens"] == 6
        assert 1 <= len(request["chunks"]) <= 6
        assert request["sent"] < request["chunks"][0]


def test_a_benchmark_with_a_wrong_key_is_refused(url: str) -> None:
    arguments = ["bench", "--url", url, "--api-key-env", "WRONG_KEY"]
    result = CliRunner(env={"WRONG_KEY": "wrong"}).invoke(app, arguments)
    assert result.exit_code == 2
    assert "GET /v1/models: HTTP 401:" in result.stderr
    assert "--api-key-env" in result.stderr


def test_a_benchmark_of_a_server_that_goes_away_is_counted(url: str) -> None:
    """Three connections before the benchmark, one of the warm-up and two of the first round."""
    with relay(int(url.rpartition(":")[2]), connections=6) as through:
        arguments = f"bench --url {through} --api-key-env CANARY_KEY --concurrency 1 --requests 4 --json"
        result = CliRunner(env={"CANARY_KEY": KEY}).invoke(app, [*arguments.split(), "--input", "16"])
    assert result.exit_code == 1, result.output
    [row] = json.loads(result.stdout)
    assert (row["finished"], row["requests"]) == (2, 8)
    assert sum(row["errors"].values()) == 6
    assert set(row["errors"]) <= {"no connection", "cut off"}
    assert "answered no request of a round" in result.stderr


def test_ctrl_c_prints_what_is_known(url: str, tmp_path: Path) -> None:
    """The second request is due in an hour."""
    trace = trace_of(tmp_path, (0, 20, 3, []), (3_600_000, 20, 3, []))
    arguments = ["--against", url, "--api-key-env", "CANARY_KEY", "--trace", str(trace)]
    before = httpx.get(f"{url}/metrics").text
    with subprocess.Popen(
        [sys.executable, "-m", "lockstep.launch.cli", "load", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"CANARY_KEY": KEY},
    ) as process:
        deadline = time.monotonic() + 60.0
        while answered(httpx.get(f"{url}/metrics").text) <= answered(before):
            assert time.monotonic() < deadline, "within 60 s the first request was not answered"
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60.0)
    assert process.returncode == 1, err
    assert "stopped early" in out
    assert "1 of 2 requests sent" in out


def answered(metrics: str) -> float:
    """Requests that the server has answered in full."""
    lines = [line for line in metrics.splitlines() if line.startswith("lockstep:request_success_total{")]
    return sum(float(line.rpartition(" ")[2]) for line in lines)
