"""The rank process: from a checkpoint on disk to tokens on the socket, and its ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from lockstep.engine.protocol.bulk import Preload, Preloaded, RankHello
from lockstep.engine.protocol.lobby import Lobby
from lockstep.engine.protocol.message import Stop
from lockstep.engine.protocol.plan import Admit, Header, Mode, Section, StepPlan
from lockstep.engine.rank.process import load_executor
from lockstep.engine.rank.progress import RankProgress
from lockstep.parallel.mesh import Mesh
from support.engine.models.checkpoints import qwen3_moe_config, write_checkpoint
from support.engine.rank.hand_plans import GREEDY, Driver, Request, build_executor
from support.engine.rank.mock_controller import MockController
from support.engine.rank.rank_process import start_rank


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("rank") / "model", qwen3_moe_config(), num_shards=2)


@pytest.fixture
def controller() -> Iterator[MockController]:
    controller = MockController()
    yield controller
    controller.close()


def _i32(*values: int) -> bytes:
    return np.asarray(values, np.int32).tobytes()


def test_a_rank_serves_and_stops(path: Path, controller: MockController) -> None:
    prompt = list(range(40, 60))
    expected = Driver(build_executor(path), [Request(prompt, 5)]).run()[0]
    with start_rank(controller.spec(model_path=str(path), kv_memory=1 << 20)) as process:
        hello = controller.receive("bulk")
        assert isinstance(hello, RankHello) and hello.pid == process.pid
        assert hello.num_pages == (1 << 20) // hello.page_bytes and (
            hello.num_layers,
            hello.num_expert_slots,
        ) == (3, 8)
        controller.send(Preload(0, _i32(*prompt)))
        assert controller.receive("bulk") == Preloaded(0, 0)
        admit = Admit(2, 0, 0, 0, len(prompt) + 5, _i32(9, 3, 5, 7), GREEDY)
        section = Section(
            rebase=True,
            admit=(admit,),
            extend_pairs=_i32(2, len(prompt)),
            publish_i32=_i32(9),
            publish_h128=b"h" * 16,
        )
        tokens: list[int] = []
        for step in range(5):
            controller.send(
                StepPlan(
                    Header(0, 0, step, step - 1, Mode.MIXED, 64, counts=step == 4),
                    section if step == 0 else Section(),
                )
            )
            result = controller.receive("step")
            tokens += np.frombuffer(result.tokens_i32, np.int32).tolist()
        assert tokens == expected
        dispatch, expert, combine = np.frombuffer(result.phases_f32, np.float32).tolist()
        assert dispatch == combine == 0 < expert, (
            "nothing travels, and the experts' time is counted all the same"
        )
        controller.send(Stop("done"))
        process.join(60.0)
        assert process.exitcode == 0


def test_a_fatal_step_ends_the_process(path: Path, controller: MockController) -> None:
    with start_rank(controller.spec(model_path=str(path), kv_memory=1 << 20)) as process:
        controller.receive("bulk")
        controller.send(StepPlan(Header(0, 0, 0, -1, Mode.MIXED, 64), Section(rebase=True, free_i32=_i32(1))))
        process.join(60.0)
        assert process.exitcode == 1 and controller.silent("step")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"kv_memory": 100}, r"kv_cache.memory: 100 bytes hold no page of \d+ bytes \(8 tokens\)"),
        ({"dtype": "fp8"}, "model.dtype = fp8: allowed are bf16, fp32"),
        ({"dispatch": "pigeon"}, "experts.dispatch = pigeon, on cpu with 1 ranks: allowed are"),
        ({"dispatch": "flashinfer"}, "experts.dispatch = flashinfer, on cpu with 1 ranks: allowed are"),
        ({"dispatch": "deepep"}, "experts.dispatch = deepep, on cpu with 1 ranks: allowed are"),
        ({"dispatch": "nccl_ep"}, "experts.dispatch = nccl_ep, on cpu with 1 ranks: allowed are"),
        (
            {"mesh": Mesh(tensor=3), "dispatch": "all_gather"},
            "4 query heads and 2 key heads cannot be split into 3 parts",
        ),
        ({"model_path": "/nowhere"}, "/nowhere: not a directory"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_computed(
    path: Path, controller: MockController, changes: dict[str, object], text: str
) -> None:
    spec = msgspec.structs.replace(controller.spec(model_path=str(path)), **changes)
    with pytest.raises(ValueError, match=text):
        load_executor(spec, lambda fraction: None)


def test_a_rank_launches_on_its_own_gpu(controller: MockController, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    spec = msgspec.structs.replace(controller.spec(model_path="/nowhere"), device="cuda:3")
    with pytest.raises(ValueError, match="/nowhere: not a directory"):
        load_executor(spec, lambda fraction: None)
    assert chosen == [torch.device("cuda:3")], "before it loads anything"


def test_a_rank_that_captures_in_an_epoch_is_ready_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher hears of each size that is computed or captured."""
    heard: list[tuple[str, str]] = []
    with Lobby(None, "rank", 0) as lobby:
        monkeypatch.setattr(lobby, "report", lambda phase, detail="": heard.append((phase, detail)))
        progress = RankProgress(lobby)
        progress.tell("computing 1 of 2 sizes of steps")
        progress.tell("capturing 1 of 1 sizes of steps")
        progress.ready("9 pages")
        assert [phase for phase, _ in heard] == ["compiling", "compiling", "ready"]
        heard.clear()
        progress.tell("")
        assert not heard, "an epoch without captures"
        for text in ("capturing 1 of 2 sizes of steps", "capturing 2 of 2 sizes of steps", ""):
            progress.tell(text)
    told = [("compiling", f"capturing {number} of 2 sizes of steps") for number in (1, 2)]
    assert heard == [*told, ("ready", "9 pages")]
