"""The real cluster, 2 local ranks and 4 through Ray, and the official client; nothing is mocked."""

from __future__ import annotations

import json
import re
import signal
import socket
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from support.launch.launcher import Launcher

PROMPT = "The planner sends the next step to every rank"
GREEDY: dict[str, Any] = {"model": "demo", "temperature": 0.0, "extra_body": {"ignore_eos": True}}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((2, "local"), id="2 ranks"),
        pytest.param((4, "ray"), id="4 ranks", marks=pytest.mark.ray),
    ],
)
def launcher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    folder = tmp_path_factory.mktemp("serve")
    ranks, backend = request.param
    fixed = ("--recipe", "demo", "frontend.port=0", "kv_cache.memory=16MiB", f"cluster.log_dir={folder}/logs")
    with Launcher(folder, *fixed, f"cluster.ranks_per_node={ranks}", f"cluster.backend={backend}") as started:
        started.url(120.0)
        yield started
        started.signal(signal.SIGTERM)
        assert started.wait(60.0) == 0, started.err
        started.assert_nothing_left()
        check_logs(folder / "logs", ranks)


def check_logs(folder: Path, ranks: int) -> None:
    """Every process has logged its life, each line with time, level and process."""
    logs = {path.stem: path.read_text().splitlines() for path in folder.glob("*/*.log")}
    [imported] = logs.pop(f"fork-server-{socket.gethostname()}")
    assert " INFO fork-server: has imported lockstep.engine.rank.imports_on_cpu in " in imported
    assert set(logs) == {"controller-0", "frontend-0", *(f"rank-{rank}" for rank in range(ranks))}
    for name, lines in logs.items():
        for line in lines:
            assert re.match(rf"\d{{4}}-\d\d-\d\dT[\d:]{{8}}\.\d{{3}}Z [A-Z]+ {name}: .", line), (
                f"{name}: {line}"
            )
        assert "starts with process id" in lines[0]
        assert " ready" in "\n".join(lines) and ": stopped" in lines[-1]
    everything = "\n".join(line for lines in logs.values() for line in lines)
    for words in ("epoch 0 begins", "loaded ", f"rank {ranks - 1} on ", "draining: ", "finish=length"):
        assert words in everything, words
    assert "silent" not in everything


@pytest.fixture
def client(launcher: Launcher) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=launcher.url(), api_key="none", max_retries=0, timeout=60.0) as made:
        yield made


def completion(client: openai.OpenAI, prompt: str, max_tokens: int = 24) -> str:
    return client.completions.create(prompt=prompt, max_tokens=max_tokens, **GREEDY).choices[0].text


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert model.id == "demo"
    assert model.model_dump()["max_model_len"] == 4096


def test_every_rank_serves(launcher: Launcher, request: pytest.FixtureRequest) -> None:
    ranks, _ = request.node.callspec.params["launcher"]
    assert all(launcher.pid_of(f"rank {rank}") for rank in range(ranks))
    with pytest.raises(AssertionError, match="no process"):
        launcher.pid_of(f"rank {ranks}")


def test_a_chat_streamed_is_the_chat_unstreamed(client: openai.OpenAI) -> None:
    messages: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello, how are you?"},
    ]
    whole = client.chat.completions.create(messages=messages, max_tokens=32, **GREEDY)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 32
    text, finish, usage = "", [], None
    with client.chat.completions.create(
        messages=messages, max_tokens=32, stream=True, stream_options={"include_usage": True}, **GREEDY
    ) as stream:
        for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                text += choice.delta.content or ""
                finish += [choice.finish_reason] if choice.finish_reason else []
    assert text == whole.choices[0].message.content
    assert finish == ["length"]
    assert usage is not None
    assert usage.completion_tokens == 32


def test_many_at_once_get_what_each_gets_alone(client: openai.OpenAI) -> None:
    prompts = [f"{PROMPT} {index}" for index in range(12)]
    alone = [completion(client, prompt) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(lambda prompt: completion(client, prompt), prompts))
    assert together == alone
    assert len(set(alone)) > 1


def test_a_long_prompt_is_prefilled_in_chunks_and_cached(client: openai.OpenAI) -> None:
    prompt = [5 + (7 * index) % 1000 for index in range(1500)]  # three chunks of max_batch_tokens = 512
    first = client.completions.create(prompt=prompt, max_tokens=8, **GREEDY)
    second = client.completions.create(prompt=prompt, max_tokens=8, **GREEDY)
    assert second.choices[0].text == first.choices[0].text
    assert second.usage is not None
    details = second.usage.prompt_tokens_details
    assert details is not None
    assert details.cached_tokens is not None
    assert details.cached_tokens >= 0.95 * (1500 - 1500 % 16)


def test_errors_are_the_clients_and_the_server_lives_on(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt", prompt="x")
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.completions.create(prompt=[9] * 5000, max_tokens=1, **GREEDY)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="demo", prompt="x", temperature=9.0)
    assert completion(client, PROMPT)


def test_a_stream_that_is_cut_leaves_the_server_well(client: openai.OpenAI, launcher: Launcher) -> None:
    with client.completions.create(prompt=PROMPT, max_tokens=2000, stream=True, **GREEDY) as stream:
        next(iter(stream))
    assert completion(client, PROMPT)
    with urllib.request.urlopen(launcher.url().removesuffix("/v1") + "/health", timeout=10) as response:
        assert json.load(response)["status"] == "ok"
