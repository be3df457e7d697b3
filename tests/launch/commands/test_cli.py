"""The command line without a cluster: usage, bad recipes and bad checkpoints."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lockstep.launch.commands.app import DEFAULT
from lockstep.launch.commands.main import app
from lockstep.launch.recipe.file import COMMANDS, find_recipe

DEMO = find_recipe("demo").parent / "demo" / "model"


def launch(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "launch"), *arguments]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=folder,
        env=os.environ | {"COLUMNS": "200"},
    )


def test_help(tmp_path: Path) -> None:
    result = launch(tmp_path, "--help")
    assert result.returncode == 0
    assert result.stdout.startswith("Usage: launch [OPTIONS] [KEY=VALUE]...\n")
    assert "--recipe" in result.stdout
    words = " ".join(result.stdout.split())
    assert all(f"launch {command}" in words for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command: str, tmp_path: Path) -> None:
    result = launch(tmp_path, command, "-h")
    assert result.returncode == 0
    overrides = "" if command in ("canary", "timeline") else " [KEY=VALUE]..."  # they take no recipe
    assert result.stdout.startswith(f"Usage: launch {command} [OPTIONS]{overrides}\n")
    assert "Exit status: 0 " in result.stdout


def test_help_imports_nothing_large() -> None:
    code = "import sys\nfrom lockstep.launch.commands import main\ntry:\n    main.run()\nexcept SystemExit:\n"
    code += "    sys.exit(bool({'numpy', 'msgspec', 'zmq', 'torch', 'ray'} & set(sys.modules)))"
    for arguments in (["--help"], *([command, "--help"] for command in COMMANDS)):
        result = subprocess.run([sys.executable, "-c", code, *arguments], timeout=60, check=False)
        assert result.returncode == 0, arguments


def test_commands_are_known_to_the_hint_for_misspelt_ones() -> None:
    names = {
        command.name or command.callback.__name__ for command in app.registered_commands if command.callback
    }
    assert names == {DEFAULT, *COMMANDS}


@pytest.mark.parametrize("arguments", [[], ["--recipe"], ["--recipes", "demo"]])
def test_wrong_usage_is_2(arguments: list[str], tmp_path: Path) -> None:
    result = launch(tmp_path, *arguments)
    assert result.returncode == 2
    assert "--recipe" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recipe", "nothing.yaml"], ["--recipe nothing.yaml: no such file", "packaged: ", "demo.yaml"]),
        (["--recipe", "."], ["--recipe .: is a directory"]),
        (["--recipe", ""], ["--recipe : no such file"]),
        (["--recipe", "dem"], ["--recipe dem: no such file", "did you mean demo.yaml?"]),
        (
            ["--recipe", "demo", "frontend.prot=3", "max_runing=2"],
            ["2 overrides", "frontend.port?", "scheduler.max_running?"],
        ),
        (["pln", "--recipe", "demo"], ["'pln'", "key=value", "did you mean launch plan?"]),
        (["--recipe", "demo", "frontend.prot=3"], ["unknown key", "did you mean frontend.port?"]),
        (["--recipe", "demo", "plan"], ["'plan'", "key=value"]),
        (["--recipe", "demo", "cluster.ranks_per_node=1", "overlap=on"], ["overlap = on", "one rank"]),
        (["--recipe", "demo", "model.max_len=5000"], ["model.max_len = 5000", "4096 positions"]),
        (["--recipe", "demo", "cluster.ranks_per_node=33"], ["= 33", "32 experts"]),
    ],
)
def test_a_bad_recipe_is_2_and_one_message(arguments: list[str], words: list[str], tmp_path: Path) -> None:
    result = launch(tmp_path, *arguments)
    assert result.returncode == 2, result.stderr
    assert all(word in result.stderr for word in words), result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def broken(folder: Path, fault: str) -> Path:
    """A copy of the demo checkpoint with a fault."""
    model = folder / "model"
    shutil.copytree(DEMO, model)
    shard = model / "model-00002-of-00002.safetensors"
    if fault == "no config":
        (model / "config.json").unlink()
    elif fault == "config is not JSON":
        (model / "config.json").write_text("{")
    elif fault == "architecture":
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    elif fault == "missing shard":
        shard.unlink()
    elif fault == "truncated shard":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif fault == "not safetensors":
        shard.write_bytes(b"\xff" * 64)
    elif fault == "index names a missing tensor":
        index = json.loads((model / "model.safetensors.index.json").read_text())
        index["weight_map"]["model.layers.9.mlp.gate.weight"] = shard.name
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return model


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("no config", ["config.json", "no such file"]),
        ("config is not JSON", ["config.json", "JSON"]),
        ("architecture", ["LlamaForCausalLM", "DeepseekV3ForCausalLM"]),
        ("missing shard", ["model-00002-of-00002.safetensors"]),
        ("truncated shard", ["model-00002-of-00002.safetensors", "truncated"]),
        ("not safetensors", ["model-00002-of-00002.safetensors", "not a safetensors file"]),
        ("index names a missing tensor", ["model.layers.9.mlp.gate.weight"]),
    ],
)
def test_a_bad_checkpoint_is_1_and_one_message_before_anything_starts(
    fault: str, words: list[str], tmp_path: Path
) -> None:
    result = launch(tmp_path, "--recipe", "demo", f"model.path={broken(tmp_path, fault)}")
    assert result.returncode == 1, result.stderr
    assert all(word in result.stderr for word in words), result.stderr
    assert "Traceback" not in result.stderr
    assert "starting" not in result.stderr


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("model: {path: nowhere}\n")
    result = launch(tmp_path, "--recipe", "mine.yaml")
    assert result.returncode == 1
    assert f"error: model.path: {tmp_path / 'nowhere'}: not a directory" in result.stderr


def test_a_recording_that_is_a_folder_is_found_before_anything_starts(tmp_path: Path) -> None:
    result = launch(tmp_path, "--recipe", "demo", f"recording={tmp_path}")
    assert result.returncode == 1
    assert f"recording = {tmp_path}: is a directory" in result.stderr
    assert "starting" not in result.stderr


def test_closed_streams_are_no_error(tmp_path: Path) -> None:
    code = "import sys\nfrom lockstep.launch import cli\nfrom lockstep.launch.commands import main\n"
    code += (
        "def run():\n    lengths = sys.stdout.write('1234567'), sys.stderr.write(''), len(sys.stdin.read())\n"
    )
    code += "    sys.exit(sum(lengths))\nmain.run = run\ncli.main()"
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        ["bash", "-c", '"$@" <&- >&- 2>&-', "bash", *command], timeout=60, check=False, cwd=tmp_path
    )
    assert result.returncode == 7
    result = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m lockstep.launch.cli --recipe nothing 2>&-"],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (result.returncode, result.stdout) == (2, b""), "an error does not go where the answer should"


@pytest.mark.parametrize(
    ("left_with", "code", "words"), [("3", 3, ""), ("None", 0, ""), ("'no room'", 1, "no room\n")]
)
def test_leaving_at_once_keeps_exit_code_and_output(
    left_with: str, code: int, words: str, tmp_path: Path
) -> None:
    start = "import atexit, sys\nfrom lockstep.launch.commands.serve import _leave_at_once_after\n"
    start += "atexit.register(print, 'torn down')\n"
    start += f"def command():\n    print('said', end='')\n    sys.exit({left_with})\n"
    start += "_leave_at_once_after(command)"
    result = subprocess.run(
        [sys.executable, "-c", start], capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path
    )
    assert (result.returncode, result.stdout, result.stderr) == (code, "said", words)


def test_ctrl_c_while_the_command_is_imported_leaves_no_trace(tmp_path: Path) -> None:
    code = "import os, signal, sys\nfrom lockstep.launch import cli\n"
    code += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # background jobs ignore it
    code += "class Finder:\n    def find_spec(*_):\n        os.kill(os.getpid(), signal.SIGINT)\n"
    code += "sys.meta_path.insert(0, Finder())\ncli.main()"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path
    )
    assert (result.returncode, result.stderr) == (-signal.SIGINT, "")
