"""The grammar desk and its keeper, without a server: answers, limits, deaths, clients that go."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from lockstep.engine.frontend.api.errors import ApiError
from lockstep.engine.frontend.grammars.claim import Claim
from lockstep.engine.frontend.grammars.desk import MAX_GRAMMAR_BYTES, MAX_JOBS, PLACES, GrammarDesk
from lockstep.engine.frontend.grammars.keeper import KeeperSpec
from support.engine.text.tiny_tokenizer import IM_END, VOCAB_SIZE, write_model

SECONDS = 30


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def claim(schema: Any, param: str = "field") -> Claim:
    return Claim("start: %json " + json.dumps(schema), param)


def endless(name: str = "") -> Claim:
    """A schema of 1 kB that takes hours to compile, or all memory."""
    return claim({"allOf": [{"type": "string", "pattern": f".*{name}{n}.*"} for n in range(20)]})


@asynccontextmanager
async def opened(model: Path, seconds: float = 600.0, memory: int = 1 << 40) -> AsyncIterator[GrammarDesk]:
    """A desk without limits that matter, unless they are given."""
    spec = KeeperSpec(
        model_path=str(model), vocab_size=VOCAB_SIZE, eos_ids=(IM_END,), seconds=seconds, memory=memory
    )
    desk = GrammarDesk(spec)
    try:
        yield desk
    finally:
        desk.close()


def run(story: Callable[[], Awaitable[None]]) -> None:
    async def whole() -> None:
        async with asyncio.timeout(SECONDS):
            await story()

    asyncio.run(whole())


async def refusal(desk: GrammarDesk, *claims: Claim) -> ApiError:
    with pytest.raises(ApiError) as refused:
        await desk.check(claims)
    return refused.value


async def children_of(desk: GrammarDesk, count: int) -> list[int]:
    """The processes that check something, once there are ``count``."""
    while True:
        pid = desk.keeper_pid
        path = Path(f"/proc/{pid}/task/{pid}/children")
        children = [int(child) for child in path.read_text().split()] if pid else []
        if len(children) == count:
            return children
        await asyncio.sleep(0.01)


def test_an_answer_is_kept_and_names_the_field_of_each_request(model: Path) -> None:
    async def story() -> None:
        async with opened(model) as desk:
            good, bad = claim({"type": "integer"}), claim({"type": "nothing"}, "first")
            assert not desk.settled([good])
            await desk.check([good, good])
            assert desk.settled([good])
            error = await refusal(desk, good, bad)
            assert (error.status_code, error.param) == (400, "first")
            assert error.detail == "first: failed to compile JSON schema: Invalid type: nothing"
            with pytest.raises(ApiError, match="second: ") as again:
                desk.settled([Claim(bad.grammar, "second")])
            assert again.value.param == "second"

    run(story)


def test_the_limit_of_time_ends_a_check(model: Path) -> None:
    async def story() -> None:
        async with opened(model, seconds=0.2) as desk:
            error = await refusal(desk, claim(True), endless())
            assert (error.status_code, error.param) == (400, "field")
            assert "more than 0.2 s (frontend.grammar_seconds)" in error.detail
            await children_of(desk, 0)
            assert await refusal(desk, endless()), "known, without a process"
            assert desk.trouble is None

    run(story)


def test_the_limit_of_memory_ends_a_check(model: Path) -> None:
    async def story() -> None:
        async with opened(model, memory=16 << 20) as desk:
            error = await refusal(desk, endless())
            assert error.status_code == 400
            assert "more than 16777216 bytes (frontend.grammar_memory)" in error.detail
            await desk.check([claim({"type": "integer"})])

    run(story)


def test_a_client_that_leaves_ends_its_check(model: Path) -> None:
    async def story() -> None:
        async with opened(model) as desk:
            checks = [asyncio.create_task(desk.check([endless()])) for _ in range(2)]
            [child] = await children_of(desk, 1)
            checks[0].cancel()
            await asyncio.wait({checks[0]})
            assert await children_of(desk, 1) == [child], "the second client waits for the same answer"
            checks[1].cancel()
            await children_of(desk, 0)
            await desk.check([claim({"type": "integer"})])

    run(story)


def test_simple_grammars_find_a_place_beside_those_that_take_long(model: Path) -> None:
    async def story() -> None:
        async with opened(model) as desk:
            slow = [asyncio.create_task(refusal(desk, endless(name))) for name in "abc"]
            await children_of(desk, PLACES - 1)
            for number in range(3):
                await desk.check([claim({"const": number})])
            await children_of(desk, PLACES - 1)
            slow.append(asyncio.create_task(refusal(desk, endless("d"))))
            await children_of(desk, PLACES)
            await desk.check([claim({"const": "waits for the last place"})])
            [given_up] = [task for task in slow if task.done()]
            error = given_up.result()
            assert (error.status_code, error.headers) == (503, {"Retry-After": "5"})
            assert "others that take long" in error.detail

    run(story)


def test_the_queue_is_bounded(model: Path) -> None:
    async def story() -> None:
        async with opened(model) as desk:
            tasks = [asyncio.create_task(desk.check([claim({"const": n})])) for n in range(MAX_JOBS)]
            await asyncio.sleep(0)
            error = await refusal(desk, claim({"const": -1}))
            assert error.status_code == 503
            assert str(MAX_JOBS) in error.detail
            await asyncio.gather(*tasks)
            await desk.check([claim({"const": -1})])

    run(story)


def test_the_death_of_keeper_and_child_is_a_503_and_no_more(model: Path) -> None:
    async def story() -> None:
        async with opened(model) as desk:
            checking = asyncio.create_task(refusal(desk, endless()))
            [child] = await children_of(desk, 1)
            assert desk.keeper_pid is not None
            os.kill(desk.keeper_pid, signal.SIGSTOP)  # so that it cannot tell how the child has ended
            os.kill(child, signal.SIGKILL)
            os.kill(desk.keeper_pid, signal.SIGKILL)
            error = await checking
            assert error.status_code == 503
            await desk.check([claim({"type": "integer"})])
            await children_of(desk, 0)
            checking = asyncio.create_task(refusal(desk, endless()))
            [child] = await children_of(desk, 1)
            os.kill(child, signal.SIGILL)
            assert "a crash" in (await checking).detail

    run(story)


def test_a_keeper_that_cannot_start_is_told(tmp_path: Path) -> None:
    async def story() -> None:
        async with opened(tmp_path) as desk:
            error = await refusal(desk, claim({"type": "integer"}))
            assert error.status_code == 503
            assert "the grammar keeper did not start" in error.detail
            assert desk.trouble == error.detail

    run(story)


def test_the_end_of_the_desk_ends_the_keeper_and_its_children(model: Path) -> None:
    async def story() -> None:
        async with opened(model) as desk:
            checking = asyncio.create_task(desk.check([endless()]))
            [child] = await children_of(desk, 1)
            keeper = desk.keeper_pid
        await asyncio.wait({checking})
        assert checking.cancelled()
        while any(Path(f"/proc/{pid}").exists() and not zombie(pid) for pid in (keeper, child)):
            await asyncio.sleep(0.01)

    run(story)


def zombie(pid: int | None) -> bool:
    """Whether a process has ended and only its parent has not asked yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def test_a_grammar_that_is_too_long_is_refused_without_a_check(model: Path) -> None:
    async def story() -> None:
        async with opened(model) as desk:
            error = await refusal(desk, Claim("x" * (MAX_GRAMMAR_BYTES + 1), "structured_outputs.choice"))
            assert (error.status_code, error.param) == (400, "structured_outputs.choice")
            assert f"at most {MAX_GRAMMAR_BYTES} are allowed" in error.detail
            assert desk.keeper_pid is None

    run(story)
