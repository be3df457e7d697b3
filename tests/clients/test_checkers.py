"""Tools that check a server: schemathesis against its own schema, lm-eval with tasks of ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.clients import Address, client_package

pytestmark = [pytest.mark.slow, pytest.mark.clients, pytest.mark.filterwarnings("ignore")]
DEMO = Path(__file__).parents[2] / "recipes/demo/model"
GENERATE = "completions|/v1/messages$|responses|invocations|/health/generate"
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
SUMS = [{"question": f"What is {a} + {b}?", "answer": str(a + b)} for a, b in ((12, 7), (30, 4), (5, 9))]


@pytest.mark.parametrize(
    "chosen",
    [
        ("--phases=coverage,fuzzing", f"--exclude-path-regex=/admin|{GENERATE}", "--max-examples=3"),
        ("--phases=fuzzing", "--mode=negative", f"--include-path-regex={GENERATE}", "--max-examples=5"),
    ],
    ids=["small answers", "wrong requests to generate"],
)
def test_schemathesis(server: Address, chosen: tuple[str, ...], tmp_path: Path) -> None:
    """Answers are as /openapi.json says, whatever is sent. Right requests to generate are left out:
    each would take as long as its answer.
    """
    client_package("schemathesis")
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.base}/openapi.json", *chosen]
    command += [f"--checks={CHECKS}", "--generation-deterministic", "--suppress-health-check=all"]
    done = subprocess.run(
        [*command, "--request-timeout=60", "--warnings=off"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert "No issues found" in done.stdout


def evaluate(config: dict[str, Any], model: str, told: dict[str, Any]) -> list[Any]:
    """The answers that the harness got from the server for each of ``SUMS``."""
    lm_eval, tasks = client_package("lm_eval", "evals"), client_package("lm_eval.api.task", "evals")
    rows = client_package("datasets", "evals").Dataset.from_list(SUMS)
    shared = {"task": "sums", "custom_dataset": lambda **ignored: {"test": rows}, "test_split": "test"}
    task = tasks.ConfigurableTask(config=shared | config)
    chat = model == "local-chat-completions"
    found = lm_eval.simple_evaluate(
        model=model, model_args=told, tasks=[task], apply_chat_template=chat, bootstrap_iters=0
    )
    return [sample["resps"] for sample in found["samples"]["sums"]]


@pytest.mark.apart
def test_lm_eval_asks_in_chats(server: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["<never>"], "max_gen_toks": 256, "temperature": 0},
        "metric_list": [{"metric": "bypass"}],
    }
    told = {"model": server.model, "base_url": f"{server.v1}/chat/completions", "tokenizer_backend": None}
    answers = evaluate(config, "local-chat-completions", told | {"tokenized_requests": False})
    for asked, [[text]] in zip(SUMS, answers, strict=True):
        assert asked["answer"] in text


@pytest.mark.apart
def test_lm_eval_scores_continuations(server: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its log-likelihoods, from prompts with ``echo``, are those of the answer's tokens."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}} The answer is",
        "doc_to_choice": [asked["answer"] for asked in SUMS],
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}],
    }
    told = {"model": server.model, "base_url": f"{server.v1}/completions", "max_length": 2048}
    told |= {"tokenizer_backend": "huggingface", "tokenizer": str(DEMO)}
    scores = evaluate(config, "local-completions", told)
    for asked, found in zip(SUMS, scores, strict=True):
        for choice, [(score, _)] in zip(SUMS, found, strict=True):
            text = f"{asked['question']} The answer is {choice['answer']}"
            own = httpx.post(
                f"{server.v1}/completions",
                json={
                    "model": server.model,
                    "prompt": text,
                    "max_tokens": 0,
                    "echo": True,
                    "logprobs": 1,
                    "add_special_tokens": False,
                },
                timeout=60,
            ).json()["choices"][0]["logprobs"]
            start = len(text) - len(choice["answer"]) - 1
            places = zip(own["text_offset"], own["token_logprobs"], strict=True)
            assert score == pytest.approx(sum(value for place, value in places if place >= start), abs=0.02)
