"""Layouts of every kind give the tokens of transformers through the front door, greedy and seeded,
with prefixes that are cached, prompts in chunks, preemption, log-probabilities of prompts, and a
rank that is killed in the middle, beside answers that a grammar forces and streams whose client
leaves; some also where every step is computed as two microbatches.
``LOCKSTEP_LAYOUTS=all`` adds layouts that others cover, kills every rank, and serves every family
on every layout of four ranks.
"""

from __future__ import annotations

import os
import random
import signal
import threading
from pathlib import Path

import pytest

from lockstep.engine.models.shape import read_shape
from support.engine.models.checkpoints import write_checkpoint
from support.engine.rank.greedy_prompts import ALL
from support.serving.mixed_asks import Known, Oracle, random_bodies
from support.serving.random_checkpoint import CONFIG, write_tokenizer
from support.serving.served import Answer, Ask, Served, serve

PAGE = 16
NUM_OUTPUT = 48
# Ranks, tensor, pipeline; the rest is data.
LAYOUTS = [(4, 1, 1), (4, 2, 1), (4, 4, 1), (4, 1, 2), (4, 2, 2), (4, 1, 4)]

CHOICES = ["first", "second"]
FORCED = {
    "prompt": [8, 9],
    "max_tokens": 60,
    "temperature": 0,
    "structured_outputs": {"choice": CHOICES},
}

ALL_LAYOUTS = os.environ.get("LOCKSTEP_LAYOUTS") == "all"

# Heads, latents, windows with sinks, an index, and norms over all heads, which cannot be split.
FAMILIES = {
    "qwen3_moe": (4, 2, 2),
    "deepseek_v3": (4, 2, 2),
    "gpt_oss": (4, 2, 2),
    "glm_moe_dsa": (2, 2, 1),
    "minimax_m2": (2, 1, 2),
}

OVERLAPPED = [(2, 1, 1), (4, 2, 1), (4, 1, 2)]
ELSEWHERE = [] if ALL_LAYOUTS else [(4, 1, 1)]  # four data parallel ranks: test_served_survivors
CASES = [(layout, "auto") for layout in LAYOUTS if layout not in OVERLAPPED + ELSEWHERE]
CASES += [(layout, "on") for layout in OVERLAPPED]


def name(layout: tuple[int, int, int]) -> str:
    ranks, tensor, pipeline = layout
    return f"pipeline{pipeline}xdata{ranks // tensor // pipeline}xtensor{tensor}"


@pytest.mark.parametrize(
    ("layout", "overlap"), CASES, ids=[f"{name(layout)}-{overlap}" for layout, overlap in CASES]
)
def test_tokens_are_those_of_transformers(
    layout: tuple[int, int, int], overlap: str, oracle: Oracle, tmp_path: Path
) -> None:
    """16 requests of 5 to 8 pages, for which no data index has pages enough; every third prompt
    begins as another does. Then the same again while the last rank is killed.
    """
    ranks, tensor, pipeline = layout
    pages = {1: 40, 2: 28, 4: 16}[ranks // tensor // pipeline]
    page_bytes = PAGE * 4 * (64 + 16) * 4 // pipeline  # layers, latent in fp32: whole on every tensor rank
    overrides = (
        f"cluster.ranks_per_node={ranks}",
        f"parallel.tensor={tensor}",
        f"parallel.pipeline={pipeline}",
        f"kv_cache.memory={pages * page_bytes}",
        "scheduler.max_batch_tokens=80",
        "scheduler.max_running=32",
        "scheduler.checksum_every=1",
        "cluster.collective_deadline=600",  # no rank needs it to hear of a death, whoever it waits for
        f"overlap={overlap}",
    )
    dice = random.Random(11)
    with serve(tmp_path / "run", *overrides) as served:
        assert {rank["pages_total"] for rank in served.cluster()["ranks"]} <= set(range(pages, pages + 2))
        bodies = random_bodies(dice, 16, (34, 80))
        for index in range(2, len(bodies), 3):
            bodies[index]["prompt"][: 2 * PAGE] = bodies[index - 2]["prompt"][: 2 * PAGE]
        known = oracle.know(served, bodies, NUM_OUTPUT)
        for _ in range(2):  # the first leaves its pages, which fit, for the second
            again = served.ok([each.ask(8) for each in known[:4]])
            for each, answer in zip(known, again, strict=False):
                each.assert_same(answer, "from the cache")
        preemptions, hits = served.counted("num_preemptions", "prefix_cache_hits")
        assert preemptions and hits, f"{preemptions:g} preemptions, {hits:g} tokens from the cache"

        score = served.ask(prompt=known[0].body["prompt"], max_tokens=0, echo=True, logprobs=1)
        values = score.document["choices"][0]["logprobs"]["token_logprobs"]
        certain = oracle.score(known[0].body["prompt"])
        assert values[1 : len(certain) + 1] == pytest.approx(certain, abs=1e-3)

        shown, [overlapped] = served.cluster()["overlap"], served.counted("overlapped_steps")
        assert shown["mode"] == ("off" if ranks == pipeline else overlap)
        assert overlap == "auto" or overlapped > 30, f"{overlapped:g} overlapped steps"

        transports = {rank["transports"] for rank in served.cluster()["ranks"]}
        assert transports == {transports_of(ranks, tensor, pipeline)}

        for rank in range(ranks) if ALL_LAYOUTS else [ranks - 1]:
            lose(served, rank, known)
        served.assert_clean()


def lose(served: Served, rank: int, known: list[Known]) -> None:
    """Kills a rank while every request is being answered: all get what they got before. Two that a
    grammar forces and two whose clients leave run beside them.
    """
    epoch, [counted] = served.cluster()["epoch"], served.counted("generation_tokens")
    answers: list[Answer] = []
    asks = [each.ask(NUM_OUTPUT, stream=index % 2 == 0) for index, each in enumerate(known)]
    beside = [Ask(FORCED), *(known[0].ask(NUM_OUTPUT, cut_after=after, stream=True) for after in (2, 9))]
    asks += [*beside, Ask(FORCED)]
    sending = threading.Thread(target=lambda: answers.extend(served.ok(asks)), daemon=True)
    sending.start()
    served.wait_until(
        lambda: served.metrics()["generation_tokens_total"] > counted + 40, "tokens are streaming"
    )
    os.kill(served.launcher.pid_of(f"rank {rank}"), signal.SIGKILL)
    sending.join(200)
    assert len(answers) == len(asks), "requests have not ended"
    assert {answers[-4].text, answers[-1].text} <= set(CHOICES)
    assert answers[-3].cut and answers[-2].cut
    for each, answer in zip(known, answers[: len(known)], strict=True):
        assert len(answer.tokens) == NUM_OUTPUT
        each.assert_same(answer, f"after rank {rank} was killed")
    served.wait_until(lambda: served.cluster()["epoch"] > epoch, "the state after the loss")


def transports_of(ranks: int, tensor: int, pipeline: int) -> str:
    """The transports that every rank of a layout shows, all being on one host."""
    shared = ["layers"] * (tensor > 1) + ["experts"] * (ranks > pipeline)
    remote = ["stages", "tokens"] * (pipeline > 1) + ["moves"] * (ranks > pipeline)
    by_gloo = f"gloo for {', '.join(remote)}"
    in_memory = f"shared memory for {', '.join(shared)}"
    if not shared:
        return by_gloo
    first = [in_memory, by_gloo] if tensor > 1 or pipeline == 1 else [by_gloo, in_memory]
    return "; ".join(first)


@pytest.mark.parametrize("family", ALL if ALL_LAYOUTS else FAMILIES)
def test_families_are_split_and_staged(family: str, tmp_path: Path) -> None:
    """One of each kind of attention is; ``test_greedy_tensor`` computes every family in parts."""
    config = ALL[family] | {"vocab_size": CONFIG["vocab_size"]}
    model = write_checkpoint(tmp_path / "model", config, seed=5)
    write_tokenizer(model)
    bodies = random_bodies(random.Random(13), 12, (4, 60))
    if ALL_LAYOUTS and family != "minimax_m2":
        chosen = [layout for layout in LAYOUTS if layout[2] <= config["num_hidden_layers"]]
    else:
        chosen = [FAMILIES[family]]
    for ranks, tensor, pipeline in chosen:
        overrides = (
            f"model.path={model}",
            f"cluster.ranks_per_node={ranks}",
            f"parallel.tensor={tensor}",
            f"parallel.pipeline={pipeline}",
            "scheduler.max_batch_tokens=64",
            "scheduler.max_running=16",
            "model.max_len=256",
        )
        with serve(tmp_path / f"run-{tensor}-{pipeline}", *overrides) as served:
            known = Oracle(model).know(served, bodies, 32)
            known.sort(key=lambda each: len(each.body["prompt"]))
            for each, answer in zip(known[-4:], served.ok([each.ask(8) for each in known[-4:]]), strict=True):
                each.assert_same(answer, "from the cache")
            assert served.counted("prefix_cache_hits") > [0]


def test_a_stage_of_one_wide_dense_layer_before_one_of_three_layers(tmp_path: Path) -> None:
    changes = {"vocab_size": CONFIG["vocab_size"], "num_hidden_layers": 4, "intermediate_size": 2048}
    model = write_checkpoint(tmp_path / "model", ALL["deepseek_v3"] | changes, seed=5)
    write_tokenizer(model)
    assert [(stage.num_layers, stage.num_moe) for stage in read_shape(model).stages(2)] == [(1, 0), (3, 3)]
    overrides = f"model.path={model}", "cluster.ranks_per_node=4", "parallel.pipeline=2", "model.max_len=256"
    with serve(tmp_path / "run", *overrides, "scheduler.checksum_every=1") as served:
        Oracle(model).know(served, random_bodies(random.Random(17), 12, (4, 60)), 32)
        served.assert_clean()


@pytest.mark.parametrize("pipeline", [1, 2] if ALL_LAYOUTS else [2])
def test_dense_blocks_of_data_parallel_ranks_are_split(pipeline: int, tmp_path: Path) -> None:
    """Few requests, so that a rank often has none; then the same while a rank is killed."""
    layout = f"cluster.ranks_per_node={2 * pipeline}", f"parallel.pipeline={pipeline}", "parallel.dense=2"
    overrides = *layout, "scheduler.checksum_every=1", "overlap=on", "experts.redundant=32"
    with serve(tmp_path / "run", *overrides) as served:
        bodies, oracle = random_bodies(random.Random(23), 5, (4, 60)), Oracle()
        known = [each for body in bodies[:2] for each in oracle.know(served, [body], 16)]
        known += oracle.know(served, bodies, NUM_OUTPUT)
        assert all("dense" in rank["transports"] for rank in served.cluster()["ranks"])
        lose(served, 1, known)
        served.assert_clean()


def test_a_grammar_beside_plain_greedy_rows_where_the_vocabulary_is_split(tmp_path: Path) -> None:
    """Ranks that do not sample know which rows have a grammar: all choose them by whole logits."""
    plain = {"prompt": [5, 6, 7], "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    overrides = "cluster.ranks_per_node=2", "parallel.tensor=2", "scheduler.checksum_every=1"
    with serve(tmp_path / "run", *overrides) as served:
        alone = served.ask(**plain)
        for _ in range(3):
            answers = served.ok([Ask(plain), Ask(FORCED), Ask(plain), Ask(FORCED)])
            assert [answer.tokens for answer in answers[::2]] == [alone.tokens] * 2
            assert {answer.text for answer in answers[1::2]} <= set(CHOICES)
        served.assert_clean()
