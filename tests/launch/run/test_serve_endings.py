"""Ends of the real cluster: drained, interrupted, with a killed rank, with a bad checkpoint.

Runs through Ray where Ray's own processes are killed or have to start another; the processes of the
cluster are the same without it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path

import httpx
import psutil
import pytest
from safetensors.torch import load_file, save_file

from lockstep.launch.recipe.file import find_recipe
from support.launch.clusters import until
from support.launch.launcher import Launcher
from support.serving.reader import Reader, refused

DEMO = find_recipe("demo").parent / "demo" / "model"
LOCAL = "cluster.backend=local"
TOKENS = 240


def launch(folder: Path, *arguments: str) -> Launcher:
    return Launcher(folder, "--recipe", "demo", "frontend.port=0", "kv_cache.memory=16MiB", *arguments)


def closed(url: str) -> bool:
    """Whether /ready reports it; a server that has gone takes no requests either."""
    try:
        return httpx.get(f"{url.removesuffix('/v1')}/ready", timeout=10.0).status_code == 503
    except httpx.TransportError:
        return True


def error_line(launcher: Launcher) -> str:
    [line] = [line for line in launcher.err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in launcher.err
    return line.removeprefix("error: ")


@pytest.mark.parametrize(
    ("way", "backend"),
    [("SIGTERM", LOCAL), pytest.param("Ctrl-C", "cluster.backend=ray", marks=pytest.mark.ray)],
)
def test_a_stop_drains_what_runs_and_leaves_nothing(way: str, backend: str, tmp_path: Path) -> None:
    with launch(tmp_path, backend) as launcher:
        url = launcher.url()
        reader = Reader(url, max_tokens=300).flowing()
        if way == "Ctrl-C":
            os.killpg(
                launcher.process.pid, signal.SIGINT
            )  # a terminal sends it to the whole foreground group, Ray's processes included
        else:
            launcher.signal(signal.SIGTERM)
        until(lambda: closed(url), "the drain to be known to the frontend", 30.0)
        assert refused(url), "a request was taken while others drained"
        reader.join(30)
        assert reader.error is None
        assert reader.finish == "length"
        assert launcher.wait() == 0, launcher.err
        launcher.assert_nothing_left()


def test_a_request_longer_than_the_drain_is_cut_off(tmp_path: Path) -> None:
    with launch(tmp_path, LOCAL, "cluster.drain_deadline=0.5") as launcher:
        reader = Reader(launcher.url(), max_tokens=4000).flowing()
        launcher.signal()
        assert launcher.wait() == 0, launcher.err
        reader.join(30)
        assert not reader.is_alive()
        assert reader.finish != "length"
        launcher.assert_nothing_left()


@pytest.mark.ray
def test_what_is_killed_is_a_pause(tmp_path: Path) -> None:
    """A rank, all of them with the process that forks them, all with their Ray actor: streams
    continue where they were, with the text of an undisturbed run. Then a rank that is idle.
    """
    with launch(tmp_path) as launcher:
        url = launcher.url()
        undisturbed = Reader(url, TOKENS)
        undisturbed.run()
        for times, victim in enumerate(("rank", "fork server", "Ray actor", "idle rank")):
            rank = psutil.Process(launcher.pid_of("rank 1"))
            server = rank.parent()
            assert server is not None
            readers = [Reader(url, TOKENS) for _ in range(0 if victim == "idle rank" else 6)]
            for reader in readers:
                reader.start()
            assert all(reader.started.wait(30) for reader in readers)
            {"fork server": server, "Ray actor": server.parent()}.get(victim, rank).kill()
            for reader in readers:
                reader.join(60)
            assert [(reader.error, reader.finish) for reader in readers] == [(None, "length")] * len(readers)
            assert {reader.text for reader in readers} <= {undisturbed.text}
            until(
                lambda times=times: launcher.err.count("all ranks serve again") > times,  # type: ignore[misc]
                f"the end of the pause to be told after the end of the {victim}",
                60.0,
            )
        assert "rank 1 on " in launcher.err
        for lost in (r"fork server on \S+ \(pid \d+\)", r"Ray actor on \S+"):
            assert re.search(
                f"the {lost} was lost, and with it rank 0, rank 1; starting others", launcher.err
            )
        Reader(url, max_tokens=3).run()
        launcher.look()
        launcher.signal()
        assert launcher.wait() == 0, launcher.err
        launcher.assert_nothing_left()


def test_a_hung_rank_is_killed_and_replaced(tmp_path: Path) -> None:
    with launch(tmp_path, LOCAL, "cluster.collective_deadline=3") as launcher:
        url, victim = launcher.url(), launcher.pid_of("rank 1")
        undisturbed = Reader(url, TOKENS)
        undisturbed.run()
        reader, late = Reader(url, TOKENS).flowing(), Reader(url, TOKENS)
        os.kill(victim, signal.SIGSTOP)
        late.start()  # finds the rank stopped even where the other has ended by now
        for each in (reader, late):
            each.join(60)
            assert (each.error, each.finish, each.text) == (None, "length", undisturbed.text)
        assert "rank 1 hangs in the middle of a step; killing it" in launcher.err
        assert "rank 0 hangs" not in launcher.err
        launcher.look()
        launcher.signal()
        assert launcher.wait() == 0, launcher.err
        launcher.assert_nothing_left()


def test_kill_9_of_the_launcher_leaves_nothing(tmp_path: Path) -> None:
    with launch(tmp_path, LOCAL) as launcher:
        launcher.url()
        launcher.process.kill()
        launcher.wait()
        launcher.assert_nothing_left()


def remove(model: Path, name: str) -> None:
    """Removes a tensor of the checkpoint from shard and index."""
    index_file = model / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    shard = model / index["weight_map"].pop(name)
    index_file.write_text(json.dumps(index))
    save_file({other: tensor for other, tensor in load_file(shard).items() if other != name}, shard)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("missing tensor", ["model.layers.2.mlp.experts.17.up_proj.weight"]),
        ("no tokenizer", ["tokenizer"]),
    ],
)
def test_a_checkpoint_that_only_a_process_can_judge_is_one_message(
    fault: str, words: list[str], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(DEMO, model)
    if fault == "missing tensor":
        remove(model, "model.layers.2.mlp.experts.17.up_proj.weight")
    else:
        (model / "tokenizer.json").unlink()
    with launch(tmp_path / "run", LOCAL, f"model.path={model}") as launcher:
        launcher.look()
        assert launcher.wait(60) == 1
        line = error_line(launcher)
        assert all(word in line for word in words), line
