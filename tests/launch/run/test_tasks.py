"""The specifications of processes: the GPU of each rank."""

from __future__ import annotations

from pathlib import Path

import msgspec

from lockstep.engine.models.config import load_config
from lockstep.engine.protocol.specs import AcceptorSpec, RankSpec
from lockstep.launch.recipe.file import find_recipe, load_recipe
from lockstep.launch.run.keyring import Keyring, process_names
from lockstep.launch.run.tasks import Site, rank_task


def test_ranks_see_all_gpus_of_their_node_and_take_one_each() -> None:
    """Torch's symmetric memory refuses ranks of a node whose GPUs have the same number."""
    recipe, _ = load_recipe("deepseek-gb200", ("cluster.nodes=2",))
    path = find_recipe("demo").parent / "configs" / "deepseek-v3"
    site = Site(
        recipe=recipe,
        config=load_config(path),
        model_path=Path(path),
        host="127.0.0.1",
        device="cuda",
        lobby_address="tcp://127.0.0.1:1",
        keyring=Keyring(process_names(recipe)),
        acceptor=AcceptorSpec(address="", token=""),
    )
    tasks = [rank_task(site, rank, "", "", "") for rank in range(recipe.world)]
    devices = [msgspec.json.decode(task.spec, type=RankSpec).device for task in tasks]
    assert devices == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"] * 2
    assert not any("CUDA_VISIBLE_DEVICES" in task.environment for task in tasks)
