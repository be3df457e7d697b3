"""The specifications of processes: the GPU of each rank, and the kernels that it keeps."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import triton

from lockstep.engine.models.config import load_config
from lockstep.engine.protocol.specs import AcceptorSpec, RankSpec
from lockstep.kernels.cpu.codegen import cache_folder
from lockstep.launch.cluster import entry
from lockstep.launch.recipe.file import find_recipe, load_recipe
from lockstep.launch.run.keyring import Keyring, process_names
from lockstep.launch.run.tasks import Site, rank_task


class Left(BaseException):
    """The process would end here."""


def site_of(device: str) -> Site:
    recipe, _ = load_recipe("deepseek-gb200", ("cluster.nodes=2",))
    path = find_recipe("demo").parent / "configs" / "deepseek-v3"
    return Site(
        recipe=recipe,
        config=load_config(path),
        model_path=Path(path),
        host="127.0.0.1",
        device=device,
        lobby_address="tcp://127.0.0.1:1",
        keyring=Keyring(process_names(recipe)),
        acceptor=AcceptorSpec(address="", token=""),
    )


def test_ranks_see_all_gpus_of_their_node_and_take_one_each() -> None:
    """Torch's symmetric memory refuses ranks of a node whose GPUs have the same number."""
    site = site_of("cuda")
    tasks = [rank_task(site, rank, "", "", "") for rank in range(site.recipe.world)]
    devices = [msgspec.json.decode(task.spec, type=RankSpec).device for task in tasks]
    assert devices == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"] * 2
    assert not any("CUDA_VISIBLE_DEVICES" in task.environment for task in tasks)


def cache_of_triton(monkeypatch: pytest.MonkeyPatch, device: str, environment: dict[str, str]) -> str:
    """Triton's folder in a rank's process with that ``environment``, as Triton reads it."""
    found: list[str] = []

    def leave(code: int) -> None:
        raise Left(code)

    for variable in ("TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.setenv(variable, "")  # so that it is restored
        monkeypatch.delenv(variable)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(entry, "leave_with_parent", lambda parent: None)
    for name in ("signal.signal", "faulthandler.enable", "lockstep.launch.cluster.entry.log_to_stderr"):
        monkeypatch.setattr(name, lambda *arguments: None)
    rank = SimpleNamespace(main=lambda spec: found.append(triton.knobs.cache.dir))
    monkeypatch.setattr(entry, "importlib", SimpleNamespace(import_module=lambda name: rank))
    spec = rank_task(site_of(device), 0, "", "", "").spec
    with pytest.raises(Left):
        entry.run("rank", 0, 1, lambda: spec)
    return found[0]


def test_a_rank_on_a_gpu_keeps_what_triton_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder that can be written, whatever its home directory, unless the user names one."""
    (tmp_path / "file").touch()  # stands for a read-only folder: nothing can be made in it
    monkeypatch.setattr(cache_folder, "__file__", str(tmp_path / "file" / "module.py"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    home = {"HOME": str(tmp_path / "home")}
    kept = tmp_path / "home" / ".cache" / "lockstep" / "triton"
    assert cache_of_triton(monkeypatch, "cuda", home) == str(kept) and kept.is_dir()
    without = {"HOME": str(tmp_path / "file")}
    spare = tmp_path / f"lockstep-{os.getuid()}" / "triton"
    assert cache_of_triton(monkeypatch, "cuda", without) == str(spare)
    named = home | {"TRITON_CACHE_DIR": "/elsewhere"}
    assert cache_of_triton(monkeypatch, "cuda", named) == "/elsewhere"
    assert cache_of_triton(monkeypatch, "cpu", home) != str(kept)
