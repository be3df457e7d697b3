"""``launch check``, its text and its JSON, and the checks before every launch."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lockstep.launch.recipe.file import find_recipe

DEMO = find_recipe("demo").parent / "demo" / "model"
LAUNCH = str(Path(sys.executable).parent / "launch")
LOCAL = ("--recipe", "demo", "cluster.backend=local", "frontend.port=0")


def run(folder: Path, *arguments: str, limit: str = "") -> subprocess.CompletedProcess[str]:
    command = [LAUNCH, *arguments]
    if limit:
        command = ["sh", "-c", f'{limit} && exec "$@"', "sh", *command]
    environment = os.environ | {"COLUMNS": "200"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=280, check=False, cwd=folder, env=environment
    )


def test_no_problems(tmp_path: Path) -> None:
    result = run(tmp_path, "check", *LOCAL)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1] == "no problems found"
    tensors = json.loads((DEMO / "model.safetensors.index.json").read_text())["weight_map"]
    assert f"ok      model: {DEMO}: {len(tensors)} tensors" in result.stdout


def test_help_names_the_statuses(tmp_path: Path) -> None:
    result = run(tmp_path, "check", "--help")
    assert result.returncode == 0
    assert "Exit status: 0 no problems, 1 errors, 2 bad recipe, 3 warnings only" in " ".join(
        result.stdout.split()
    )


def test_a_bad_recipe_is_2(tmp_path: Path) -> None:
    result = run(tmp_path, "check", "--recipe", "demo", "cluster.nods=2")
    assert result.returncode == 2
    assert "did you mean cluster.nodes?" in result.stderr


def test_errors_are_1_in_json_too(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(DEMO, model)
    shard = model / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run(
            tmp_path,
            "check",
            *LOCAL,
            f"frontend.port={port}",
            f"model.path={model}",
            "deterministic=true",
            "--json",
        )
    assert result.returncode == 1
    answer = json.loads(result.stdout)
    assert (answer["recipe"], answer["status"]) == ("demo.yaml", 1)
    errors = {finding["subject"]: finding for finding in answer["findings"] if finding["level"] == "error"}
    assert set(errors) == {"model", "port", "recipe"}
    assert f"{shard}: truncated" in errors["model"]["text"]
    assert errors["model"]["where"] == socket.gethostname()
    assert f"frontend.port = {port}: cannot be listened on: Address already in use" in errors["port"]["text"]
    assert "deterministic = true" in errors["recipe"]["text"]
    assert all(finding["todo"] for finding in errors.values() if finding["subject"] != "recipe")


def test_only_warnings_are_3(tmp_path: Path) -> None:
    result = run(tmp_path, "check", *LOCAL, limit="ulimit -n 1024")
    assert result.returncode == 3, result.stdout + result.stderr
    assert "warning limits: " in result.stdout
    assert "1024 open files limit client connections; raise it (ulimit -n 65536)" in result.stdout
    assert result.stdout.splitlines()[-1] == "1 warning"


@pytest.mark.parametrize(
    ("limit", "arguments", "words"),
    [
        ("ulimit -n 200", (), "limits: {host}: 200 open files, and 2 ranks take 272; raise it"),
        ("", ("kv_cache.memory=900TiB",), "memory: {host}: "),
        (
            "",
            ("cluster.log_dir=/dev/null/logs",),
            "disk: {host}: /dev/null: not a writable folder",
        ),
    ],
)
def test_launching_looks_first_and_refuses_before_anything_starts(
    limit: str, arguments: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    result = run(tmp_path, *LOCAL, *arguments, limit=limit)
    assert result.returncode == 1
    assert words.format(host=socket.gethostname()) in result.stderr
    assert "starting" not in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.ray
def test_a_ray_of_our_own_is_started_asked_and_ended(tmp_path: Path) -> None:
    result = run(tmp_path, "check", "--recipe", "demo", "frontend.port=0")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "ok      Ray: room for the ranks on" in result.stdout
    result = run(tmp_path, "check", "--recipe", "demo", "frontend.port=0", "cluster.address=127.0.0.1:1")
    assert result.returncode == 1
    assert "error   Ray: the Ray cluster at 127.0.0.1:1 cannot be reached" in result.stdout
    assert "ok      model: " in result.stdout
