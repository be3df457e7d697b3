"""Request traces: accepted and refused lines, generated requests, equal tokens of equal blocks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lockstep.engine.planner.settings import Settings
from lockstep.engine.protocol.specs import SchedulerSpec
from lockstep.launch.simulation.trace import Trace, TraceError, TraceRequest, read_trace
from lockstep.parallel.mesh import Mesh

LINE = {"timestamp": 1500, "input_length": 1200, "output_length": 7, "hash_ids": [3, 4, 5]}


def written(folder: Path, *lines: object) -> str:
    path = folder / "trace.jsonl"
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return str(path)


def test_a_line_of_a_public_trace(tmp_path: Path) -> None:
    more = {
        "timestamp": 3500,
        "input_length": 1,
        "output_length": 1,
        "hash_ids": [9],
        "type": "chat",
        "turn": 2,
    }
    trace = read_trace(written(tmp_path, LINE, "", more))
    assert trace.requests == (TraceRequest(0.0, 1200, 7, (3, 4, 5)), TraceRequest(2.0, 1, 1, (9,)))


def test_names_of_blocks_may_be_missing_and_the_last_may_be_left_out(tmp_path: Path) -> None:
    bare = {name: LINE[name] for name in ("timestamp", "input_length", "output_length")}
    trace = read_trace(written(tmp_path, bare, LINE | {"hash_ids": []}, LINE | {"hash_ids": [3, 4]}, LINE))
    assert [request.ids for request in trace.requests] == [(), (), (3, 4), (3, 4, 5)]


def test_faster_fewer_and_in_order(tmp_path: Path) -> None:
    late, early = (
        LINE | {"timestamp": 9000, "output_length": 1},
        LINE | {"timestamp": 5000, "output_length": 2},
    )
    path = written(tmp_path, late, early, LINE, "not read any more")
    asks = read_trace(path, 3, 2.0).requests
    assert [(ask.seconds, ask.num_output) for ask in asks] == [(0.0, 7), (1.75, 2), (3.75, 1)]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: not JSON"),
        ("[" * 20000, "line 2: not JSON"),
        ([1], "line 2: should be an object with timestamp"),
        ({"timestamp": 0, "input_length": 1}, "line 2: output_length: missing"),
        (LINE | {"timestamp": "0"}, 'line 2: timestamp = "0": should be milliseconds, a number from 0 on'),
        (LINE | {"timestamp": -1}, "line 2: timestamp = -1"),
        (
            LINE | {"timestamp": float("nan")},
            "line 2: not JSON: invalid character at column 15; expected one JSON object per line",
        ),
        (LINE | {"timestamp": True}, "line 2: timestamp = true"),
        (
            LINE | {"input_length": 0},
            "line 2: input_length = 0: should be a whole number of tokens from 1 to 10,000,000",
        ),
        (LINE | {"input_length": 1.5}, "line 2: input_length = 1.5"),
        (LINE | {"output_length": 0}, "line 2: output_length = 0"),
        (LINE | {"output_length": None}, "line 2: output_length = null"),
        (LINE | {"hash_ids": "345"}, 'line 2: hash_ids = "345": should be a list of whole numbers'),
        (
            LINE | {"hash_ids": [3, "4", 5]},
            'line 2: hash_ids[1] = "4": should be a list of whole numbers from 0',
        ),
        (LINE | {"hash_ids": [3, -4, 5]}, "line 2: hash_ids[1] = -4"),
        (
            LINE | {"hash_ids": [1 << 62, 4, 5]},
            f"hash_ids[0] = {1 << 62}: should be a list of whole numbers from 0 to {(1 << 62) - 1}",
        ),
        (
            LINE | {"hash_ids": [3]},
            "line 2: hash_ids: has 1 blocks, should be 3, one per 512 tokens of input_length = 1200 (--block",
        ),
        (LINE | {"hash_ids": [3, 4, 5, 6]}, "line 2: hash_ids: has 4 blocks"),
    ],
)
def test_a_wrong_line_is_named_with_its_field_and_what_is_allowed(
    line: object, words: str, tmp_path: Path
) -> None:
    with pytest.raises(TraceError) as error:
        read_trace(written(tmp_path, LINE, line))
    assert words in str(error.value)


def test_blocks_of_another_size(tmp_path: Path) -> None:
    path = written(tmp_path, LINE | {"input_length": 40})
    assert read_trace(path, block=16).requests[0].ids == (3, 4, 5)
    with pytest.raises(TraceError, match="--block"):
        read_trace(path)


def test_arrivals_that_a_clock_cannot_tell_apart_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, LINE | {"timestamp": 0}, LINE | {"timestamp": 1e12})
    assert read_trace(path).requests[1].seconds == 1e9
    with pytest.raises(TraceError, match=r"arrive over 2e\+09 s at --speed 0\.5; should be 1e\+09 s at most"):
        read_trace(path, speed=0.5)
    with pytest.raises(TraceError, match="arrive over"):
        read_trace("poisson:rate=1e-300,input=1,output=1,count=3")


def test_a_file_that_is_one_array_over_several_lines_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "array.json"
    path.write_text("[\n")
    with pytest.raises(
        TraceError,
        match=r"json: line 1: not JSON: ends too early, at column 2; expected one JSON object per line",
    ):
        read_trace(str(path))


def test_a_file_that_is_not_there_or_empty(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"nothing\.jsonl: cannot be read: No such file.*poisson:rate=R"):
        read_trace(str(tmp_path / "nothing.jsonl"))
    with pytest.raises(TraceError, match="holds no request"):
        read_trace(written(tmp_path, ""))


# --------------------------------------------------------------------------- made traffic


def test_made_traffic_arrives_at_random_at_its_rate() -> None:
    trace = read_trace("poisson:rate=20,input=2000,output=300,count=4000")
    times = np.array([request.seconds for request in trace.requests])
    gaps = np.diff(times)
    assert (len(times), times[0]) == (4000, 0.0)
    assert gaps.mean() == pytest.approx(0.05, rel=0.05) and gaps.std() == pytest.approx(0.05, rel=0.1)
    assert {(request.num_input, request.num_output, request.ids) for request in trace.requests} == {
        (2000, 300, ())
    }
    assert trace.requests == read_trace("poisson:rate=20,input=2000,output=300,count=4000,seed=0").requests
    assert trace.requests != read_trace("poisson:rate=20,input=2000,output=300,count=4000,seed=1").requests
    assert read_trace(trace.source, 5, 2.0).requests[4].seconds == pytest.approx(times[4] / 2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rate=20,input=2000,output=300", "count is missing; should be poisson:rate=R,input=N"),
        ("", "'' is unknown"),
        ("rate=20,inputs=3", "'inputs' is unknown"),
        ("rate=20,rate=3", "'rate' is given twice"),
        ("rate=0,input=1,output=1,count=1", "rate = 0: should be a number of requests per second above 0"),
        ("rate=x,input=1,output=1,count=1", "rate = x"),
        ("rate=inf,input=1,output=1,count=1", "rate = inf"),
        ("rate=1e-320,input=1,output=1,count=1", "rate = 1e-320"),
        ("rate=1,input=0,output=1,count=1", "input = 0: should be a whole number from 1 to 10,000,000"),
        ("rate=1,input=1,output=1.5,count=1", "output = 1.5"),
        ("rate=1,input=1,output=1,count=99999999", "count = 99999999"),
        ("rate=1,input=1,output=1,count=1,seed=-1", "seed = -1: should be a whole number from 0"),
    ],
)
def test_made_traffic_that_cannot_be_made(text: str, words: str) -> None:
    with pytest.raises(TraceError) as error:
        read_trace(f"poisson:{text}")
    assert words in str(error.value)


# --------------------------------------------------------------------------- prompts


def test_equal_names_are_equal_tokens_and_others_are_not() -> None:
    asks = (
        TraceRequest(0, 1200, 1, (3, 4, 5)),
        TraceRequest(0, 1300, 1, (3, 4, 6)),
        TraceRequest(0, 1100, 1, (3, 4)),
        TraceRequest(0, 1200, 1),
        TraceRequest(0, 1200, 1),
    )
    trace = Trace("made", asks)
    prompts = [np.frombuffer(trace.prompt(number), np.int32) for number in range(5)]
    assert [len(prompt) for prompt in prompts] == [1200, 1300, 1100, 1200, 1200]
    assert min(prompt.min() for prompt in prompts) >= 0
    assert (prompts[0][:1024] == prompts[1][:1024]).all() and (prompts[0][:1024] == prompts[2][:1024]).all()
    blocks = [prompt[start : start + 16].tobytes() for prompt in prompts for start in range(0, 1024, 16)]
    assert len(set(blocks)) == 3 * 64, "three different beginnings of 1,024 tokens"
    assert prompts[0][1024] != prompts[1][1024] != prompts[2][1024]


def test_a_request_is_what_a_frontend_would_send() -> None:
    trace = Trace("made", (TraceRequest(0.5, 1200, 7, (3, 4, 5)), TraceRequest(0.7, 99_000, 1000)))
    settings = Settings(Mesh(), SchedulerSpec(), [100], 64, 99_999)
    (first, submit), (_, too_long) = trace.arrivals(settings)
    assert (first, submit.handle, submit.limit, len(submit.prompt_i32)) == (0.5, 0, 1207, 4800)
    assert len(submit.hashes_h128) == 16 * (1 + 1200 // 64)
    assert (too_long.limit, too_long.prompt_i32) == (100_000, b""), "nobody makes a prompt that is refused"
    bare = Settings(Mesh(), SchedulerSpec(prefix_caching=False), [100], 64, 99_999)
    assert next(trace.arrivals(bare))[1].hashes_h128 == b""
