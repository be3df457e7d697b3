"""The memory in which frontends show one another their counts."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from lockstep.engine.frontend.metrics.counters import Counters, unpack
from lockstep.engine.frontend.metrics.shared_counters import SLOT_BYTES, SharedCounters, shared_bytes


def slots(num: int) -> list[SharedCounters]:
    memory = os.memfd_create("counters")
    os.ftruncate(memory, shared_bytes(num))
    made = [SharedCounters(os.dup(memory), index) for index in range(num)]
    os.close(memory)
    return made


def test_everybody_reads_what_each_wrote_last() -> None:
    first, second, third = slots(3)
    assert first.own() == b"" and first.others() == []
    first.write(b"one")
    second.write(b"two")
    first.write(b"three")
    assert (first.own(), first.others()) == (b"three", [b"two"])
    assert third.others() == [b"three", b"two"]


def test_a_text_that_does_not_fit_is_refused_and_leaves_the_last() -> None:
    [slot] = slots(1)
    slot.write(b"small")
    with pytest.raises(ValueError, match=f"are {SLOT_BYTES} bytes, its slot holds"):
        slot.write(bytes(SLOT_BYTES))
    assert slot.own() == b"small"
    slot.write(bytes(SLOT_BYTES // 2 - 24))
    assert len(slot.own()) == SLOT_BYTES // 2 - 24


# In bursts: a frontend writes a few times a second, and a long text takes longer to copy out than
# the next takes to be written.
WRITER = """
import itertools, sys, time
from lockstep.engine.frontend.metrics.shared_counters import SharedCounters
slot = SharedCounters(int(sys.argv[1]), 0)
for turn in itertools.count():
    slot.write(bytes([turn % 256]) * (1 + turn * 37 % 200_000))
    if turn == 0:
        print("writing", flush=True)
    if turn % 8 == 0:
        time.sleep(0.0005)
"""


def test_what_is_read_is_whole_while_another_process_writes_and_after_it_was_killed() -> None:
    memory = os.memfd_create("counters")
    os.ftruncate(memory, shared_bytes(2))
    reader = SharedCounters(os.dup(memory), 1)
    os.set_inheritable(memory, True)
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(memory)], stdout=subprocess.PIPE, pass_fds=(memory,)
    ) as writer:
        try:
            assert writer.stdout is not None and writer.stdout.readline() == b"writing\n"
            sizes, begun = set(), time.monotonic()
            while len(sizes) <= 10 or time.monotonic() < begun + 0.7:
                assert time.monotonic() < begun + 30, "the writer stood still"
                [text] = reader.others()
                assert len(set(text)) == 1, "half of one text, half of another"
                sizes.add(len(text))
        finally:
            writer.kill()
    [text] = reader.others()
    assert len(set(text)) == 1 and text == SharedCounters(os.dup(memory), 0).own(), (
        "what was valid when it died"
    )
    os.close(memory)


def test_counters_add_up() -> None:
    total = Counters()
    for seconds, status in ((0.02, 200), (0.07, 200), (3.0, 503)):
        one = Counters()
        one.inter_token.observe(seconds)
        one.finishes["stop"] += 2
        one.request("/v1/models", "GET", status, seconds)
        total.add(unpack(one.pack(1.0, 5)))
    counts, seconds = total.inter_token.pack()
    assert sum(counts) == 3 and seconds == pytest.approx(3.09)
    assert [index for index, count in enumerate(counts) if count] == [1, 3, 13], (
        "buckets up to 0.025, 0.075 and 5 s"
    )
    assert total.finishes["stop"] == 6
    assert dict(total.http) == {("/v1/models", "GET", "2xx"): 2, ("/v1/models", "GET", "5xx"): 1}
    assert total.http_seconds["/v1/models", "GET"].pack()[0] == [0, 1, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0]
