"""Ranks as on GPUs, without any: the executor of a device whose work the host does not wait for,
and a double of NCCL in which a dead peer is silent. A rank that is killed under load is a pause.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path

from support.engine.models.checkpoints import write_checkpoint
from support.engine.rank.greedy_prompts import FAMILIES
from support.serving.mixed_asks import Oracle, random_bodies
from support.serving.random_checkpoint import CONFIG, write_tokenizer
from support.serving.served import Answer, Ask, serve

NUM_OUTPUT = 32


def test_a_rank_that_is_killed_is_a_pause(tmp_path: Path) -> None:
    """Some requests have penalties: the host waits for the device before it begins a step."""
    config = FAMILIES["qwen3_moe"] | {"vocab_size": CONFIG["vocab_size"], "num_hidden_layers": 2}
    model = write_checkpoint(tmp_path / "model", config, seed=5)
    write_tokenizer(model)
    overrides = (
        f"model.path={model}",
        "cluster.ranks_per_node=2",
        "experts.balance=off",
        "experts.dispatch=all_gather",
        "overlap=off",
        "scheduler.checksum_every=1",
        "cluster.collective_deadline=600",  # no rank needs it to hear of a death
        "model.max_len=256",
    )
    module = "support.launch.launch_late_ranks"
    with serve(tmp_path / "run", *overrides, module=module) as served:
        bodies = random_bodies(random.Random(11), 4, (8, 30))
        known = Oracle(model).know(served, bodies, NUM_OUTPUT)
        [rank, other] = served.cluster()["ranks"]
        assert rank["transports"] == other["transports"] == "NCCL for experts"
        assert rank["recovery"] == "abort and recapture"

        epoch, [counted] = served.cluster()["epoch"], served.counted("generation_tokens")
        penalties = {"temperature": 0.7, "seed": 4, "presence_penalty": 1.0, "max_tokens": NUM_OUTPUT}
        asks = [each.ask(NUM_OUTPUT, stream=index % 2 == 0) for index, each in enumerate(known)]
        asks += [Ask({**body, **penalties, "return_token_ids": True}) for body in bodies[::2]]
        answers: list[Answer] = []
        sending = threading.Thread(target=lambda: answers.extend(served.ok(asks)), daemon=True)
        sending.start()
        served.wait_until(
            lambda: served.metrics()["generation_tokens_total"] > counted + 40, "tokens are streaming"
        )
        os.kill(served.launcher.pid_of("rank 1"), signal.SIGKILL)
        killed, [before] = time.monotonic(), served.counted("generation_tokens")
        served.wait_until(
            lambda: served.metrics()["generation_tokens_total"] > before, "the streams go on", 100.0
        )
        print(f"a pause of {time.monotonic() - killed:.1f} s")
        sending.join(100)
        assert len(answers) == len(asks), "streams have not ended"
        for each, answer in zip(known, answers, strict=False):
            assert len(answer.tokens) == NUM_OUTPUT
            each.assert_same(answer, "after a rank was killed")
        assert [len(answer.tokens) for answer in answers[len(known) :]] == [NUM_OUTPUT] * 2
        served.wait_until(lambda: served.cluster()["epoch"] > epoch, "the state after the loss")
        served.assert_clean()
