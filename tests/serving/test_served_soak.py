"""Mixed requests under pressure, recorded: survivors get their tokens, all resources
are freed, and the recording replays.
"""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

from support.serving.mixed_asks import Known, Oracle, random_bodies
from support.serving.served import Answer, Ask, serve

WAVES = (60, 90, 30)
NUM_KNOWN, MOST_TOKENS = 30, 64


def random_ask(dice: random.Random, known: list[Known], number: int) -> tuple[Known, Ask]:
    """One of the known requests for a random number of tokens: streamed or not, cut off or not,
    sharing pages or not.
    """
    each = dice.choice(known)
    stream = dice.random() < 0.6
    fields = {"stream": stream} | ({"cache_salt": f"{number}"} if dice.random() < 0.5 else {})
    cut = dice.randint(1, 40) if stream and dice.random() < 0.3 else None
    return each, each.ask(dice.randint(1, MOST_TOKENS), cut_after=cut, **fields)


def judge(each: Known, ask: Ask, answer: Answer) -> None:
    assert answer.status == 200, answer.document
    each.assert_same(answer, "in the soak")
    if not answer.cut:
        assert answer.done
        assert (len(answer.tokens), answer.finish) == (ask.body["max_tokens"], "length")


def test_soak_and_replay(oracle: Oracle, tmp_path: Path) -> None:
    recording = tmp_path / "recording"
    dice = random.Random(99)
    pages = f"kv_cache.memory={48 * 20480}"
    with serve(
        tmp_path / "run",
        f"recording={recording}",
        pages,
        "scheduler.max_running=24",
        "scheduler.max_batch_tokens=128",
    ) as served:
        known = oracle.know(served, random_bodies(dice, NUM_KNOWN, (1, 250)), MOST_TOKENS, at_once=20)
        for wave in WAVES:
            asked = [random_ask(dice, known, dice.randrange(10**9)) for _ in range(wave)]
            for (each, ask), answer in zip(asked, served.together([ask for _, ask in asked]), strict=True):
                judge(each, ask, answer)
        served.assert_clean()
    replayed = subprocess.run(
        [sys.executable, "-m", "lockstep.engine.recording.replay", str(recording)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert replayed.returncode == 0, replayed.stderr
    assert "all as recorded" in replayed.stdout
    assert int(replayed.stdout.splitlines()[-1].split()[0]) > 200
