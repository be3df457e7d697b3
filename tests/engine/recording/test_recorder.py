"""A recording replays to the same plans, and a changed one is noticed."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from lockstep.engine.kv.hashing import chain_hashes
from lockstep.engine.planner.group_plan import GroupPlan
from lockstep.engine.planner.planner import Planner
from lockstep.engine.planner.settings import Settings
from lockstep.engine.protocol.bulk import Preload, Preloaded
from lockstep.engine.protocol.frontends import Abort, Submit
from lockstep.engine.protocol.message import Sampling
from lockstep.engine.protocol.plan import Admit, Header, Mode, Section, StepPlan
from lockstep.engine.protocol.results import StepResult
from lockstep.engine.protocol.specs import SchedulerSpec
from lockstep.engine.recording import recorder
from lockstep.engine.recording.recorder import Mismatch, Recorder, digest, replay
from lockstep.engine.simulation.simulated_rank import SimulatedRank
from lockstep.parallel.mesh import Mesh
from support.engine.planner.planner_world import ROOT


def record(path: Path) -> int:
    """Serves ten requests, one of them aborted, and records it. Returns the number of plans."""
    settings = Settings(Mesh(data=2), SchedulerSpec(max_running=4, max_batch_tokens=32), [40, 40], 4, 96)
    planner, recorder = Planner(settings), Recorder(path, settings)
    ranks = [SimulatedRank(rank, 4, 24) for rank in range(2)]
    plans = 0
    for index in range(10):
        tokens = np.arange(index, index + 20, dtype=np.int32).tobytes()
        sampling = Sampling(seed=index, num_prompt_logprobs=index % 3 - 1)
        submit = Submit(index, str(index), tokens, chain_hashes(ROOT, tokens, 4), 40, sampling)
        recorder.event("submit", 0, submit)
        planner.submit(0, submit)
    for turn in range(150):
        if turn == 9:
            recorder.event("abort", 0, Abort(1))
            planner.abort(0, Abort(1))
        plan = planner.plan()
        recorder.plan(plan)
        recorder.event("tidy")
        planner.tidy()
        for rank, message in planner.take_staging():
            ranks[rank].stage(message)
            if isinstance(message, Preload):
                recorder.event("staged", Preloaded(rank, message.staged))
                planner.staged(Preloaded(rank, message.staged))
        planner.take_output()
        if plan is not None:
            plans += 1
            results = [
                ranks[data].execute(StepPlan(plan.header, section)) for data, section in plan.sections.items()
            ]
            booked = [result for result in results if isinstance(result, StepResult)]
            recorder.event("results", booked)
            planner.results(booked)
    assert planner.idle()
    recorder.close()
    return plans


def test_a_full_disk_ends_a_recording_and_says_why() -> None:
    settings = Settings(Mesh(), SchedulerSpec(max_running=4, max_batch_tokens=32), [40], 4, 96)
    recorder = Recorder(Path("/dev/full"), settings)
    assert recorder.failure == ""
    recorder.flush()
    assert "No space left" in recorder.failure
    for _ in range(3):
        recorder.event("tidy")
        recorder.flush()
    recorder.close()
    assert "No space left" in recorder.failure


def test_a_recording_replays_to_the_same_plans(tmp_path: Path) -> None:
    plans = record(tmp_path / "recording")
    assert sum(1 for _ in replay(tmp_path / "recording")) == plans > 20


def test_only_its_owner_can_read_a_recording(tmp_path: Path) -> None:
    path = tmp_path / "recording"
    path.write_text("an older file that all may read")
    path.chmod(0o644)
    for _ in range(2):
        record(path)
        assert path.stat().st_mode & 0o777 == 0o600
        path.unlink()


def test_a_recording_cut_off_ends_where_it_is_cut(tmp_path: Path) -> None:
    plans = record(tmp_path / "recording")
    whole = (tmp_path / "recording").read_bytes()
    (tmp_path / "recording").write_bytes(whole[: len(whole) // 2 + 1])
    assert 0 < sum(1 for _ in replay(tmp_path / "recording")) < plans


def test_a_plan_that_differs_is_noticed(tmp_path: Path) -> None:
    record(tmp_path / "recording")
    whole = (tmp_path / "recording").read_bytes()
    (tmp_path / "recording").write_bytes(whole.replace(b"\xabmax_running\x04", b"\xabmax_running\x03"))
    with pytest.raises(Mismatch):
        list(replay(tmp_path / "recording"))


def record_with(path: Path, old: bytes, new: bytes) -> None:
    """A recording in which ``old`` bytes are replaced by ``new`` ones of the same length."""
    record(path)
    whole = path.read_bytes()
    assert whole.count(old) >= 1 and len(old) == len(new)
    path.write_bytes(whole.replace(old, new))


def command(path: Path) -> tuple[int, str, str]:
    """Exit status, output and errors of the replay command."""
    arguments = [sys.executable, "-m", "lockstep.engine.recording.replay", str(path)]
    run = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    return run.returncode, run.stdout, run.stderr


def test_the_command_replays_a_recording(tmp_path: Path) -> None:
    plans = record(tmp_path / "recording")
    code, output, errors = command(tmp_path / "recording")
    assert (code, errors) == (0, "")
    assert output.endswith(f"\n{plans} plans replayed, all as recorded\n")


def test_the_command_names_step_and_versions_when_a_plan_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "__version__", "0.0.7")
    digests = iter([True] * 12)
    plain = recorder.digest
    monkeypatch.setattr(
        recorder, "digest", lambda plan: plain(plan) if plan is None or next(digests, None) else b"another"
    )
    record(tmp_path / "recording")
    monkeypatch.undo()
    code, output, errors = command(tmp_path / "recording")
    [line] = errors.splitlines()
    last = output.splitlines()[-1].partition(": ")[0].rpartition(" ")[2]
    assert code == 1 and len(output.splitlines()) == 12
    assert line == (
        f"{tmp_path / 'recording'}: step {int(last) + 1}: the plan differs from the recorded one; "
        f"it was recorded by version 0.0.7, this is {recorder.__version__}"
    )


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"\xabmax_running\x04", b"\xabmax_running\x03", "settings are not read as they were recorded"),
        (
            b"\xabmax_running\x04",
            b"\xabmax_running\xc0",
            "settings are not understood: Expected `int`, got `None`",
        ),
        (b"\x92\xa4tidy\x90", b"\x92\xa4tiny\x90", "step 0: the recording names the unknown call 'tiny'"),
        (b"\xa7version", b"\xa7aversio", "its first record does not say who made it"),
    ],
)
def test_the_mismatch_says_what_is_wrong(tmp_path: Path, old: bytes, new: bytes, words: str) -> None:
    record_with(tmp_path / "recording", old, new)
    with pytest.raises(Mismatch, match=words):
        list(replay(tmp_path / "recording"))


def test_a_file_that_is_no_recording_gives_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for name in ("empty", "missing"):
        code, _, errors = command(tmp_path / name)
        assert code == 1 and len(errors.splitlines()) == 1 and errors.startswith(f"{tmp_path / name}: ")


def test_settings_encode_as_in_old_recordings_and_name_the_group() -> None:
    first = Settings(Mesh(data=2), SchedulerSpec(), [40, 40], 4, 96)
    keys = ["layout", "spec", "num_pages", "page_size", "max_len"]
    assert list(msgspec.msgpack.decode(msgspec.msgpack.encode(first))) == keys
    second = msgspec.structs.replace(first, group=1)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(second), type=Settings) == second
    planner = Planner(second)
    tokens = np.arange(8, dtype=np.int32).tobytes()
    planner.submit(0, Submit(0, "0", tokens, chain_hashes(ROOT, tokens, 4), 12, Sampling()))
    planner.tidy()
    for rank, message in planner.take_staging():
        assert isinstance(message, Preload)
        planner.staged(Preloaded(rank, message.staged))
    plan = planner.plan()
    assert plan is not None and plan.header.group == 1


def test_fields_of_sampling_that_came_later_change_no_digest_while_unused() -> None:
    """The digest of the plan below is that of the first recordings."""

    def plan(**later: object) -> GroupPlan:
        admit = Admit(1, 7, 16, 0, 40, b"\1\0\0\0", Sampling(seed=3, **later))  # type: ignore[arg-type]
        return GroupPlan(Header(0, 0, 5, 4, Mode.MIXED, 8), {0: Section(admit=(admit,), bucket=8)})

    sampling = [1.0, 1.0, 0, 0.0, 0.0, 0.0, 1.0, 3, 0, -1, b"", b"", b"", -1]
    admit = [1, 7, 16, 0, 40, b"\1\0\0\0", sampling]
    first = msgspec.msgpack.encode([False, 0, b"", b"", b"", [admit], b"", b"", b"", [], b"", 8])
    header = msgspec.msgpack.encode([0, 0, 5, 4, Mode.MIXED, 8, 1, 0, False, False, [], []])
    assert digest(plan()) == hashlib.blake2b(header + b"0" + first, digest_size=16).digest()
    assert len({digest(plan()), digest(plan(prompt_ranks=True)), digest(plan(bad_words_i32=b"1234"))}) == 3
