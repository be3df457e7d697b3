"""``launch simulate``: figures equal hand-computed floors and the plan's; errors of the command."""

from __future__ import annotations

import io
import json
import os
import signal
import statistics
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from msgspec import structs
from rich.console import Console

from lockstep.engine.models.config import IndexerConfig, MlaConfig
from lockstep.engine.simulation.simulated_group import StepWork
from lockstep.launch.capacity.anchors import PUBLISHED, floor_beside
from lockstep.launch.capacity.floors import (
    Work,
    attention_seconds,
    decode_work,
    floor_of,
    index_read_seconds,
    index_seconds,
    read_seconds,
)
from lockstep.launch.capacity.plan import CapacityPlan, plan_recipe
from lockstep.launch.commands import simulate as simulate_command
from lockstep.launch.defaults import EFFICIENCY
from lockstep.launch.recipe.file import load_recipe
from lockstep.launch.recipe.recipe import Recipe, contradictions
from lockstep.launch.simulation import screen as simulate_screen, simulate as simulation
from lockstep.launch.simulation.evaluate import quantiles
from lockstep.launch.simulation.report import SimulationReport
from lockstep.launch.simulation.screen import ProgressScreen, show_report
from lockstep.launch.simulation.simulate import Progress, StopAfter, settings_of, simulate_plan
from lockstep.launch.simulation.times import FloorTimes
from lockstep.launch.simulation.trace import Trace, TraceRequest
from lockstep.launch.terminal.interrupts import Interrupts

QWEN, DEEPSEEK, LITE = "qwen3-30b-a3b-8xh100", "deepseek-gb200", "deepseek-v2-lite"


@cache
def planned(name: str, *overrides: str) -> tuple[CapacityPlan, Recipe]:
    recipe, path = load_recipe(name, overrides, contradictions)
    return plan_recipe(recipe, path.parent), recipe


def simulated(
    asks: list[TraceRequest], name: str, *overrides: str, efficiency: float = 1.0
) -> SimulationReport:
    plan, recipe = planned(name, *overrides)
    report = simulate_plan(plan, recipe, Trace("made", tuple(asks)), efficiency, lambda progress: False)
    assert report.complete
    counts = report.requests
    assert (
        counts.finished + counts.refused + counts.unavailable == counts.asked == len(asks)
        and counts.open == 0
    )
    return report


def work_of(*, decodes: list[int], context: int = 0, chunks: list[int]) -> StepWork:
    """Rows that decode at ``context``, and one whole prompt per rank."""
    rows, own = np.array(decodes), np.array(chunks)
    attended = own * (own + 1) // 2
    return StepWork(rows, rows + own, rows + (own > 0), rows * context, attended, rows * context + own)


def whole_prompt(tokens: int, ranks: int) -> Work:
    """A prompt on one of ``ranks``, the others have none."""
    return Work(tokens, 1, tokens * (tokens + 1) / 2, tokens, tokens / ranks, False)


# --------------------------------------------------------------------------- time of a step


@pytest.mark.parametrize("name", [QWEN, DEEPSEEK, LITE, "gpt-oss-120b", "demo"])
def test_steady_decode_takes_what_the_plan_says(name: str) -> None:
    plan, _ = planned(name)
    data, rows = plan.setup.mesh.data, plan.largest_batch_per_rank
    times = FloorTimes(plan.setup, 0.5)
    seconds = times(work_of(decodes=[rows] * data, context=plan.context, chunks=[0] * data))
    assert seconds == pytest.approx(2 * plan.seconds_per_token)
    assert {part for part, bound in times.bound.items() if bound} == {plan.decode.floor.binds}


@pytest.mark.parametrize(("dispatch", "binds"), [("all_gather", "network"), ("local", "compute")])
def test_a_prompt_on_one_rank_is_work_of_all_experts(dispatch: str, binds: str) -> None:
    setup = replace(planned(QWEN)[0].setup, dispatch=dispatch)
    floor = floor_of(setup, whole_prompt(8000, 8))
    own = FloorTimes(setup, 1.0)(work_of(decodes=[0] * 8, chunks=[8000] + [0] * 7))[0]
    assert floor.binds == binds
    assert own[0] == pytest.approx(floor.seconds)
    assert (own[1:] == own[1]).all() and own[1] <= own[0]


def test_decode_and_prefill_attend_at_their_own_cost() -> None:
    """In decode, latent attention works on the latent. At such a context nothing else counts."""
    plan, _ = planned(DEEPSEEK)
    shape = plan.setup.shape
    zeros = np.zeros(72, np.int64)
    far = np.full(72, 10**12)
    decode, prompt = (
        FloorTimes(plan.setup, 1.0)(StepWork(zeros, zeros + 1, zeros, *pair, pair[0]))
        for pair in ((far, zeros), (zeros, far))
    )
    assert decode / prompt == pytest.approx(
        shape.attention_operations(True) / shape.attention_operations(False), rel=1e-3
    )


def test_a_window_bounds_what_half_of_the_layers_see() -> None:
    """Far out only attention counts, and every other layer has a window; within it nothing
    changes.
    """
    setup = planned("gpt-oss-120b")[0].setup
    whole = replace(setup, shape=replace(setup.shape, windows=()))
    far = 10**9
    for work in (
        work_of(decodes=[1] * 8, context=far, chunks=[0] * 8),
        work_of(decodes=[0] * 8, chunks=[far] * 8),
    ):
        bounded, all_layers = (FloorTimes(each, 1.0)(work).max() for each in (setup, whole))
        assert bounded / all_layers == pytest.approx(0.5, abs=0.02)
    near = work_of(decodes=[64] * 8, context=128, chunks=[0] * 8)
    assert FloorTimes(setup, 1.0)(near) == pytest.approx(FloorTimes(whole, 1.0)(near))
    beyond = work_of(decodes=[64] * 8, context=10**6, chunks=[0] * 8)
    floor = floor_of(setup, decode_work(64, 10**6))
    assert FloorTimes(setup, 1.0)(beyond) == pytest.approx(floor.seconds)


def test_an_indexer_scores_every_position_and_attention_sees_the_best() -> None:
    """Far out its scores alone count; where all positions are chosen, they are added."""
    setup = planned(DEEPSEEK)[0].setup
    assert isinstance(setup.shape.attention, MlaConfig)
    attention = replace(setup.shape.attention, indexer=IndexerConfig(64, 128, 2048))
    indexed = replace(setup, shape=replace(setup.shape, attention=attention))
    assert indexed.shape.index_key_bytes("fp8") == 132 and not setup.shape.index_key_bytes("fp8")
    far = work_of(decodes=[1] * 72, context=10**9, chunks=[0] * 72)
    chosen, whole = (FloorTimes(each, 1.0)(far).max() for each in (indexed, setup))
    position = max(attention_seconds(setup, True), read_seconds(setup))
    scored = max(index_seconds(indexed), index_read_seconds(indexed))
    assert chosen / whole == pytest.approx(scored / position, rel=0.02) and scored < position / 5
    for context in (2000, 10**6):
        work = work_of(decodes=[64] * 72, context=context, chunks=[0] * 72)
        floor = floor_of(indexed, decode_work(64, context))
        assert FloorTimes(indexed, 1.0)(work) == pytest.approx(floor.seconds)
        assert (floor.memory > floor_of(setup, decode_work(64, context)).memory) == (context == 2000)


def test_the_default_is_what_published_figures_reach() -> None:
    shares = sorted(figure.rate / figure.tokens * floor_beside(figure).seconds for figure in PUBLISHED)
    assert (len(shares), round(shares[0], 2), round(statistics.median(shares), 2), round(shares[-1], 2)) == (
        9,
        0.24,
        0.31,
        0.5,
    )
    assert pytest.approx(statistics.median(shares), abs=0.02) == EFFICIENCY


def test_the_exchange_of_dense_groups_counts_at_the_fullest_rank() -> None:
    plan, _ = planned(DEEPSEEK, "parallel.dense=4")
    alone = replace(plan.setup, mesh=structs.replace(plan.setup.mesh, dense=0))
    works = (work_of(decodes=[rows] + [0] * 71, chunks=[0] * 72) for rows in (1, 10**7))
    few, many = (FloorTimes(plan.setup, 1.0)(work).max() for work in works)
    floors = [floor_of(setup, decode_work(10**7, 0)).network for setup in (plan.setup, alone)]
    assert floors[0] > floors[1] and many >= floors[0] > few


def test_stages_share_the_layers_and_add_up_to_the_plan() -> None:
    plan, _ = planned(QWEN, "parallel.pipeline=2")
    seconds = FloorTimes(plan.setup, 1.0)(work_of(decodes=[8] * 4, context=4096, chunks=[0] * 4))
    assert seconds.shape == (2, 4)
    assert seconds.sum(axis=0) == pytest.approx(floor_of(plan.setup, decode_work(8, 4096)).seconds)


# --------------------------------------------------------------------------- simulations


def test_a_lone_request_sees_the_floors_of_its_steps() -> None:
    """The first of ten has its prompt cut: nothing has been measured yet."""
    plan, _ = planned(QWEN)
    report = simulated([TraceRequest(100.0 * number, 3000, 3) for number in range(10)], QWEN)
    first = floor_of(plan.setup, whole_prompt(3000, 8)).seconds
    second, third = (
        floor_of(plan.setup, Work(1, 1, context, context, 1 / 8, True)).seconds for context in (3001, 3002)
    )
    assert report.time_to_first_token.p50 == pytest.approx(first)
    assert report.time_between_tokens.p99 == pytest.approx(third)
    assert report.seconds == pytest.approx(900 + first + second + third)
    assert (report.tokens.input, report.tokens.output, report.preemptions) == (30_000, 30, 0)
    assert 3 < report.steps.count - 9 * 3 <= 8


def test_half_the_efficiency_is_twice_the_time() -> None:
    whole, half = (
        simulated([TraceRequest(0.0, 20_000, 50)], QWEN, efficiency=efficiency) for efficiency in (1.0, 0.5)
    )
    for name in ("time_to_first_token", "time_between_tokens"):
        slow, fast = getattr(half, name), getattr(whole, name)
        assert [slow.p50, slow.p90, slow.p99] == pytest.approx([2 * fast.p50, 2 * fast.p90, 2 * fast.p99])
    assert half.tokens.output_per_second == pytest.approx(whole.tokens.output_per_second / 2)


def test_a_full_cluster_decodes_at_the_rate_of_the_plan() -> None:
    """With all slots taken at the plan's context, the time between tokens is the plan's step."""
    small = ("scheduler.max_running=16",)
    plan, _ = planned(QWEN, *small)
    report = simulated([TraceRequest(0.0, 3896, 400) for _ in range(128)], QWEN, *small, efficiency=0.5)
    assert plan.largest_batch == 128
    assert report.steps.rows.p50 == 128
    assert report.time_between_tokens.p50 == pytest.approx(2 * plan.seconds_per_token, rel=0.02)
    assert report.tokens.output == 128 * 400
    assert (report.held["slots"], report.held["pages"]) == (0, 0), (
        "who waits for a turn of admission lacks nothing"
    )


def test_equal_prefixes_are_computed_once() -> None:
    asks = [TraceRequest(10.0 * number, 1100, 2, (7, 8, 100 + number)) for number in range(5)]
    report = simulated(asks, QWEN)
    assert (report.prefix.asked, report.prefix.saved) == (5500, 4 * 1024), (
        "16 pages of 64 tokens, on the rank that has them"
    )
    unlike = simulated([TraceRequest(ask.seconds, 1100, 2) for ask in asks], QWEN)
    assert unlike.prefix.saved == 0
    off = simulated(asks, QWEN, "kv_cache.prefix_caching=false")
    assert off.prefix.saved == 0
    assert report.time_to_first_token.p50 < unlike.time_to_first_token.p50  # type: ignore[operator]
    assert report.steps.idle > 0.9 and report.binds.startswith("Nothing binds")


def test_load_above_capacity_queues_and_is_answered_503() -> None:
    small = ("scheduler.max_running=4", "scheduler.max_queue=20")
    calm = simulated([TraceRequest(0.5 * number, 500, 100) for number in range(40)], QWEN, *small)
    rush = simulated([TraceRequest(0.001 * number, 500, 100) for number in range(200)], QWEN, *small)
    assert calm.requests.unavailable == 0 and calm.queue_wait.p99 < 0.1  # type: ignore[operator]
    assert rush.requests.unavailable > 50
    assert rush.queue_wait.p90 > 5 * calm.queue_wait.p99  # type: ignore[operator]
    assert rush.steps.rows.p90 == rush.steps.rows.p99 == 32
    assert (
        rush.binds.startswith("Sequence slots bind") and f"{rush.requests.unavailable} requests" in rush.binds
    )


def test_few_pages_bind_and_preempt() -> None:
    few = ("kv_cache.memory=128MiB", "model.max_len=2048")
    report = simulated([TraceRequest(0.0, 200, 1500) for _ in range(60)], QWEN, *few)
    assert report.preemptions > 0
    assert report.pages.peak_of_a_rank > 0.95
    assert report.binds.startswith("KV pages bind")


def test_much_to_prefill_binds() -> None:
    report = simulated([TraceRequest(0.01 * number, 30_000, 2) for number in range(60)], QWEN)
    assert report.held["prefill"] > 0.5 and report.binds.startswith("Prefill binds")


def test_long_prompts_on_few_ranks_bind_by_their_imbalance() -> None:
    asks = [TraceRequest(0.0, 100, 4000) for _ in range(64)] + [
        TraceRequest(1.0 + number, 30_000, 2) for number in range(20)
    ]
    report = simulated(asks, DEEPSEEK, "scheduler.inter_token_target=0.1")
    assert report.steps.waiting > 0.3 and report.steps.imbalance.p99 > 3  # type: ignore[operator]
    assert (
        report.binds.startswith("Imbalance binds")
        and "few have prompts to compute and a step may take 0.1 s" in report.binds
    )
    even = simulated([TraceRequest(0.0, 4000, 50) for _ in range(72)], DEEPSEEK)
    assert even.steps.waiting < 0.05 and "Imbalance" not in even.binds


def test_what_is_too_long_is_refused() -> None:
    plan, recipe = planned(QWEN)
    assert settings_of(plan, recipe).max_len == 32768
    report = simulated(
        [TraceRequest(0.0, 32_000, 768), TraceRequest(0.0, 32_000, 769), TraceRequest(0.0, 9_000_000, 1)],
        QWEN,
    )
    assert (report.requests.finished, report.requests.refused) == (1, 2)
    report = simulated([TraceRequest(0.0, 32_000, 769)], QWEN)
    assert report.binds.startswith("Nothing ran: all requests are longer than the context of 32,768 tokens")


def test_pages_and_bounds_are_the_plans() -> None:
    plan, recipe = planned(DEEPSEEK)
    settings = settings_of(plan, recipe)
    assert settings.num_pages == [plan.ranks[0].memory.num_pages] * 72
    assert (settings.spec.max_batch_tokens, settings.spec.max_running, settings.spec.max_queue) == (
        1024,
        512,
        8192,
    )
    assert (settings.page_size, settings.max_len) == (64, 131072)


def test_quantiles_are_values_that_were_seen() -> None:
    assert quantiles([]).p50 is None
    assert quantiles([5.0]).p99 == 5.0
    assert quantiles(range(1, 101)) == quantiles([*range(1, 101)], [1] * 100)
    found = quantiles(np.arange(1, 101)[::-1])
    assert (found.p50, found.p90, found.p99) == (50, 90, 99)
    assert quantiles([1.0, 2.0, 9.0], [90, 9, 1]) == quantiles([1.0] * 90 + [2.0] * 9 + [9.0])
    assert quantiles([1.0, 2.0, 9.0], [90, 9, 1]).p99 == 2.0


# --------------------------------------------------------------------------- the command


def command(folder: Path, *arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    start = [str(Path(sys.executable).parent / "launch")] if code is None else [sys.executable, "-c", code]
    words = [*start, "simulate", *arguments]
    return subprocess.run(
        words,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=folder,
        env=os.environ | {"COLUMNS": "200"},
    )


SHORT = "poisson:rate=20,input=300,output=20,count=30"


def test_a_person_reads_tables(tmp_path: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; from lockstep.launch.cli import main; main()"
    refused = "deterministic=true"
    result = command(tmp_path, "--recipe", DEEPSEEK, "--trace", SHORT, refused, code=code)
    assert result.returncode == 0, result.stderr
    words = (
        "time to first token",
        "time between tokens",
        "wait in the queue",
        "prefix tokens saved",
        "this version refuses to launch it",
    )
    for text in (
        *words,
        "preemptions",
        "planner, on this machine",
        "2 ms p50, 4 ms p99",
        "0.3 of the speed of their floors",
        "Nothing",
    ):
        assert text in result.stdout


def test_a_program_reads_json_and_the_same_again(tmp_path: Path) -> None:
    arguments = (
        "--recipe",
        "demo",
        "--trace",
        SHORT,
        "--json",
        "--speed",
        "2",
        "--requests",
        "20",
        "--efficiency",
        "0.5",
    )
    results = [command(tmp_path, *arguments) for _ in range(2)]
    first, second = (json.loads(result.stdout) for result in results)
    measured = first.pop("measured")
    second.pop("measured")
    assert first == second
    spread = {"p50", "p90", "p99"}
    assert set(measured) == {"planner", "limit_p50", "limit_p99", "wall"} and measured["planner"]["p50"] > 0
    assert (first["recipe"], first["speed"], first["efficiency"], first["complete"]) == (
        "demo.yaml",
        2.0,
        0.5,
        True,
    )
    assert first["requests"] == {"asked": 20, "finished": 20, "refused": 0, "unavailable": 0, "open": 0}
    assert first["tokens"]["input"] == 20 * 300 and first["tokens"]["output"] == 20 * 20
    assert first["tokens"]["output_per_second"] == pytest.approx(400 / first["seconds"])
    assert first["tokens"]["output_per_second_per_rank"] == pytest.approx(200 / first["seconds"])
    for name in ("time_to_first_token", "time_between_tokens", "queue_wait"):
        assert (
            set(first[name]) == spread and 0 <= first[name]["p50"] <= first[name]["p90"] <= first[name]["p99"]
        )
    assert set(first["steps"]) == {"count", "seconds", "rows", "tokens", "imbalance", "idle", "waiting"}
    assert first["steps"]["imbalance"]["p50"] >= 1
    assert sum(first["bound"].values()) == pytest.approx(1) and set(first["held"]) == {
        "slots",
        "pages",
        "prefill",
    }
    assert 0 < first["pages"]["mean"] <= first["pages"]["peak"] <= first["pages"]["peak_of_a_rank"] <= 1


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--recipe", "nothing", "--trace", SHORT], 2, "not a packaged recipe"),
        (["--recipe", "demo", "--trace", "nothing.jsonl"], 2, "nothing.jsonl: cannot be read"),
        (["--recipe", "demo", "--trace", "poisson:rate=1"], 2, "input is missing"),
        (["--recipe", "demo"], 2, "--trace"),
        (["--recipe", "demo", "--trace", SHORT, "--efficiency", "2"], 2, "--efficiency"),
        (["--recipe", "demo", "--trace", SHORT, "--speed", "0"], 2, "--speed"),
        (["--recipe", "bare.yaml", "--trace", SHORT], 2, "cluster.hardware: missing, and a plan needs it"),
        (
            ["--recipe", "mixtral-8x7b", "cluster.ranks_per_node=1", "--trace", SHORT],
            1,
            "does not fit: weights: 87",
        ),
    ],
)
def test_what_cannot_be_simulated_is_one_message(
    arguments: list[str], status: int, words: str, tmp_path: Path
) -> None:
    _, path = load_recipe(QWEN, check=contradictions)
    text = path.read_text().replace("configs/", f"{path.parent}/configs/")
    (tmp_path / "bare.yaml").write_text(
        "\n".join(line for line in text.splitlines() if "hardware:" not in line)
    )
    result = command(tmp_path, *arguments)
    assert result.returncode == status, result.stdout
    assert words in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr and result.stdout == ""


def test_a_planner_that_gets_nowhere_is_an_error_that_names_the_request(tmp_path: Path) -> None:
    code = "from lockstep.engine.simulation import simulation; simulation.patience = lambda settings: 3\n"
    code += "from lockstep.launch.cli import main; main()"
    result = command(
        tmp_path, "--recipe", "demo", "--trace", "poisson:rate=1,input=4000,output=9,count=1", code=code
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert (
        "nobody has got a token for 3 steps, and request 0 (4000 prompt tokens, limit 4009) is in prefill"
        in result.stderr
    )


def test_ctrl_c_prints_what_was_simulated(tmp_path: Path) -> None:
    arguments = ["--recipe", "demo", "--trace", "poisson:rate=5,input=300,output=200,count=500000", "--json"]
    start = [str(Path(sys.executable).parent / "launch"), "simulate", *arguments]
    code = f"import signal, sys\nsys.argv = {start!r}\n"
    code += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from lockstep.launch.simulation import screen\nscreen._EVERY = 0.2\n"
    code += "from lockstep.launch.cli import main\nmain()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    ) as process:
        assert process.stderr is not None and process.stdout is not None
        try:
            for line in process.stderr:
                assert "s simulated, " in line and "of 500,000 requests answered" in line, line
                if "simulated, 0 of" not in line:
                    break
            process.send_signal(signal.SIGINT)
            report = json.loads(process.stdout.read())
            assert process.wait(timeout=30) == 1
        finally:
            process.kill()
    assert not report["complete"]
    assert 0 < report["requests"]["finished"] < 500_000
    assert report["requests"]["open"] == 500_000 - report["requests"]["finished"]


def test_a_report_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    for more in ("", " --json"):
        line = f"launch simulate --recipe demo --trace {SHORT}{more} > /dev/full"
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        result = subprocess.run(
            ["bash", "-c", line],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd=tmp_path,
            env=os.environ | {"PATH": path},
        )
        assert (result.returncode, result.stderr) == (
            1,
            "error: cannot write the report: No space left on device\n",
        )


def test_a_second_ctrl_c_gives_the_cursor_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(
        plan: CapacityPlan,
        recipe: Recipe,
        trace: Trace,
        efficiency: float,
        stop_after: StopAfter,
        *further: object,
    ) -> SimulationReport:
        stop_after(Progress(0.0, 1, 0, 0))
        raise KeyboardInterrupt

    paper = io.StringIO()
    monkeypatch.setattr(simulate_screen, "_BLINK", 0.0)
    monkeypatch.setattr(simulation, "simulate_plan", interrupted)
    terminal = Console(file=paper, width=100, force_terminal=True)
    monkeypatch.setattr(simulate_command, "messages", lambda: terminal)
    monkeypatch.setattr(Interrupts, "install", lambda interrupts: None)
    with pytest.raises(KeyboardInterrupt):
        simulate_command.simulate("demo", SHORT)
    assert paper.getvalue().count("\x1b[?25l") == paper.getvalue().count("\x1b[?25h") == 1


def test_progress_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    paper = io.StringIO()
    monkeypatch.setattr(simulate_screen, "_EVERY", 0.0)
    screen = ProgressScreen(Console(file=paper, width=100))
    screen.show(Progress(12.34, 1000, 300, 250))
    screen.hide()
    assert paper.getvalue().split("s  ", 1)[1] == "12.3 s simulated, 250 of 1,000 requests answered\n"


def test_a_report_of_nothing_can_be_shown() -> None:
    plan, recipe = planned(QWEN)
    report = simulate_plan(
        plan, recipe, Trace("made", (TraceRequest(0.0, 10, 10),)), 1.0, lambda progress: True
    )
    paper = io.StringIO()
    show_report(report, plan, "qwen", 1.0, Console(file=paper, width=100))
    assert "stopped early" in paper.getvalue() and "Nothing ran." in paper.getvalue()
    assert (report.requests.open, report.time_to_first_token.p50) == (1, None)


def test_a_burst_is_spread_over_the_ranks_before_anything_is_known_of_their_speed() -> None:
    asks = [TraceRequest(number / 200, 3000, 100) for number in range(600)]
    report = simulated(asks, DEEPSEEK, "scheduler.inter_token_target=0.05", efficiency=0.3)
    assert report.queue_wait.p99 < 0.1  # type: ignore[operator]
