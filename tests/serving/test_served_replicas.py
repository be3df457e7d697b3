"""Redundant experts through the front door: equal tokens, placement told, a rank replaced."""

from __future__ import annotations

import json
import os
import random
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from support.serving.mixed_asks import Oracle, random_bodies
from support.serving.random_checkpoint import CONFIG
from support.serving.served import serve

LAYERS = CONFIG["num_hidden_layers"] - CONFIG["first_k_dense_replace"]
EXPERTS, REDUNDANT = CONFIG["n_routed_experts"], 4


@pytest.mark.parametrize(
    ("dispatch", "pipeline", "loaded"), [("all_to_all", 1, True), ("all_gather", 2, False)]
)
def test_tokens_are_the_same_with_replicas(
    dispatch: str, pipeline: int, loaded: bool, oracle: Oracle, tmp_path: Path
) -> None:
    overrides = [
        "cluster.ranks_per_node=4",
        f"parallel.pipeline={pipeline}",
        f"experts.dispatch={dispatch}",
        f"experts.redundant={REDUNDANT}",
    ]
    if loaded:
        loads_LE = np.random.default_rng(1).lognormal(3, 1, (LAYERS, EXPERTS)).astype(int)
        (tmp_path / "loads.json").write_text(json.dumps({"expert_load": loads_LE.tolist()}))
        overrides.append(f"experts.loads={tmp_path / 'loads.json'}")
    bodies = random_bodies(random.Random(17), 16, (4, 80))
    with serve(tmp_path / "run", *overrides) as served:
        known = oracle.know(served, bodies, 24)
        state = served.cluster()
        for span in state["placement"]:
            held = Counter(
                expert
                for ranges in span["experts"]
                for low, high in ranges
                for expert in range(low, high + 1)
            )
            assert set(held) == set(range(EXPERTS)) and held.total() == EXPERTS + REDUNDANT
        epoch = state["epoch"]
        os.kill(served.launcher.pid_of("rank 3"), signal.SIGKILL)
        asks = [each.ask(24, stream=False) for each in known]
        for each, answer in zip(known, served.ok(asks), strict=True):
            each.assert_same(answer, "after a rank was killed")
        served.wait_until(lambda: served.cluster()["epoch"] > epoch, "the state after the loss")
        served.assert_clean()
