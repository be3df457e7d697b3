"""``launch bench`` as its user types it, against doubles on real sockets."""

from __future__ import annotations

import csv
import importlib.util
import json
import socket
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner, Result

from lockstep.launch.commands.main import app
from support.launch.scripted_endpoint import scripted_endpoint

SMALL = ("--input", "8", "--output", "6", "--rounds", "2", "--requests", "4", "--concurrency", "1,2")


def bench(url: str, *arguments: object) -> Result:
    return CliRunner(env={"KEY": "right", "WRONG": "wrong"}).invoke(
        app, ["bench", "--url", url, *map(str, arguments)]
    )


def rows(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_a_table_shows_what_was_measured() -> None:
    with scripted_endpoint() as double:
        result = bench(double.url, *SMALL)
    assert result.exit_code == 0, result.output
    assert f"{double.url} serves scripted, version unknown" in result.stderr
    assert "8 tokens in, 6 out; 2 rounds of concurrency 1 (4 requests), concurrency 2 (4 requests)" in (
        result.stderr
    )
    assert f"concurrency 2, round 2 of 2, {double.url}: 4 requests; " in result.stderr
    for name in ("concurrency 1: 8 requests in 2 rounds", "concurrency 2: 8 requests in 2 rounds"):
        assert name in result.stdout
    for name in ("TTFT", "ITL", "TPOT", "end to end", "output tokens/s", "requests/s"):
        assert result.stdout.count(name) == 2
    assert "limit: not known; --recipe names the recipe that the server runs" in result.stdout
    assert "ratio" not in result.stdout


def test_another_server_stands_beside_it() -> None:
    with scripted_endpoint() as ours, scripted_endpoint() as theirs:
        result = bench(ours.url, *SMALL, "--against", theirs.url)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("  against") == 2 * 6
    assert "ratio" in result.stdout
    assert len(ours.bodies) == len(theirs.bodies) == 2 * 2 * 4 + 1 + 2


def test_the_limit_of_a_recipe_stands_beside_it() -> None:
    with scripted_endpoint() as double:
        recipe = ("--recipe", "demo", "cluster.backend=local")
        refused = bench(double.url, *SMALL, *recipe)
        result = bench(double.url, *SMALL, *recipe, "model.served_name=scripted", "--json")
        shown = bench(double.url, *SMALL, *recipe, "model.served_name=scripted")
    assert refused.exit_code == 2
    assert f"--recipe: its model is demo, {double.url} serves scripted" in refused.stderr
    assert result.exit_code == 0, result.output
    assert "limit: floors of launch plan at the peak rates of cluster.hardware = cpu" in shown.stdout
    first, second = json.loads(result.stdout)
    assert 0 < first["limit_tpot_ms"] < second["limit_tpot_ms"]
    assert second["limit_output_tokens_per_s"] == pytest.approx(2000 / second["limit_tpot_ms"], rel=1e-3)


def test_a_folder_holds_rows_requests_and_a_plot(tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    with scripted_endpoint() as ours, scripted_endpoint(refusals={2: 503}) as theirs:
        result = bench(ours.url, *SMALL, "--against", theirs.url, "--out", out)
        again = bench(ours.url, *SMALL, "--out", out)
    assert result.exit_code == 1, "a request failed"
    found = rows(out)
    assert [(row["endpoint"], row["concurrency"]) for row in found] == [
        ("url", 1),
        ("against", 1),
        ("url", 2),
        ("against", 2),
    ]
    assert found[1]["errors"] == {"HTTP 503": 1}
    assert found[1]["finished"] == 7
    assert "1 failed, HTTP 503: " in result.stdout
    with (out / "rows.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [line["ttft_p99_ms"] for line in table] == [str(row["ttft_p99_ms"]) for row in found]
    assert table[1]["errors"] == "HTTP 503: 1"
    asked = [json.loads(line) for line in (out / "requests.jsonl").read_text().splitlines()]
    assert len(asked) == 2 * 2 * 2 * 4
    assert [bool(each["error"]) for each in asked].count(True) == 1
    assert {len(each["chunks"]) for each in asked if not each["error"]} == {7}, "6 tokens and an end"
    if importlib.util.find_spec("matplotlib"):
        assert ElementTree.parse(out / "plot.svg").getroot().tag.endswith("svg")
    assert again.exit_code == 2
    assert f"--out {out}: holds rows.jsonl of an earlier run; should be another folder" in again.stderr


def test_a_rate_is_offered(tmp_path: Path) -> None:
    with scripted_endpoint() as double:
        result = bench(double.url, "--rate", "100,200.5", "--requests", "5", "--output", "2", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [(row["rate"], row["concurrency"], row["requests"]) for row in found] == [
        (100.0, None, 15),
        (200.5, None, 15),
    ]
    assert all(row["late_p50_ms"] is not None for row in found)


def test_answers_without_usage_are_told() -> None:
    with scripted_endpoint(usage=False) as double:
        result = bench(double.url, *SMALL)
    assert result.exit_code == 0, result.output
    assert "8 answers came without usage; their tokens are counted by chunks" in result.stdout


def test_a_server_that_dies_in_the_middle_leaves_what_was_measured(tmp_path: Path) -> None:
    """The second level begins with request 10."""
    with scripted_endpoint(dies_at=12) as double:
        result = bench(double.url, *SMALL, "--out", tmp_path)
    assert result.exit_code == 1, result.output
    assert f"stopped early: {double.url} answered no request of a round" in result.stderr
    first, second = rows(tmp_path)
    assert (first["finished"], first["failed"]) == (8, 0)
    assert second["failed"] > 0
    assert set(second["errors"]) <= {"no connection", "cut off"}
    assert any(f"failed, {kind}:" in result.stdout for kind in ("no connection", "cut off"))


def test_a_wrong_key_is_refused_by_name() -> None:
    with scripted_endpoint(key="right") as double, scripted_endpoint(key="right") as other:
        right = bench(double.url, *SMALL, "--api-key-env", "KEY")
        wrong = bench(double.url, *SMALL, "--api-key-env", "WRONG")
        against = ("--against", other.url, "--against-key-env", "WRONG")
        theirs = bench(double.url, *SMALL, "--api-key-env", "KEY", *against)
    assert right.exit_code == 0, right.output
    assert (wrong.exit_code, theirs.exit_code) == (2, 2)
    assert f"{double.url}: GET /v1/models: HTTP 401: wrong key (--api-key-env names" in wrong.stderr
    assert f"{other.url}: GET /v1/models: HTTP 401: wrong key (--against-key-env names" in theirs.stderr
    assert len(other.bodies) == 0


def test_a_vocabulary_that_no_server_tells_is_asked_for() -> None:
    with scripted_endpoint(vocab=None) as silent, scripted_endpoint(vocab=50) as told:
        refused = bench(silent.url, *SMALL)
        given = bench(silent.url, *SMALL, "--vocab", "7")
        borrowed = bench(silent.url, *SMALL, "--against", told.url)
    assert refused.exit_code == 2
    assert f"--vocab: missing, and {silent.url} does not report its vocabulary" in refused.stderr
    assert (given.exit_code, borrowed.exit_code) == (0, 0)
    highest = max(token for body in silent.bodies for token in body["prompt"])
    assert 7 <= highest < 50
    assert "prompts use ids below 50 there too" in borrowed.stderr


def test_a_context_that_is_too_short_is_refused() -> None:
    with scripted_endpoint(max_len=100) as double:
        result = bench(double.url, "--input", "90", "--output", "11")
    assert result.exit_code == 2
    assert f"--input 90 and --output 11: {double.url} serves at most 100 tokens" in result.stderr


def test_a_server_that_is_not_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    result = bench(f"http://127.0.0.1:{port}")
    assert result.exit_code == 3
    assert str(port) in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--concurrency", "0"], "--concurrency 0: should be whole numbers from 1 to 10,000"),
        (["--concurrency", "1,two"], "--concurrency 1,two: should be whole numbers"),
        (["--concurrency", "1.5"], "--concurrency 1.5: should be whole numbers"),
        (["--concurrency", "8,8"], "--concurrency 8,8: should be"),
        (["--concurrency", ""], "--concurrency : should be"),
        (["--rate", "0"], "--rate 0: should be numbers above 0"),
        (["--rate", "nan"], "--rate nan: should be"),
        (["--rate", "1e9"], "--rate 1e9: should be"),
        (["--rate", "-1"], "--rate -1: should be"),
        (["--rate", ",".join(map(str, range(1, 30)))], "--rate: 29 levels; should be at most 20"),
        (["--rate", "1", "--concurrency", "1"], "give one of --concurrency and --rate"),
        (["--concurrency", "8", "--requests", "4"], "--requests 4: fewer than --concurrency 8"),
        (["--requests", "0"], "--requests"),
        (
            ["--requests", "100000", "--input", "4096"],
            "--input 4096: 100,000 requests (--requests) of so many",
        ),
        (["--rounds", "0"], "--rounds"),
        (["--input", "0"], "--input"),
        (["--output", "0"], "--output"),
        (["--shared", "1.5"], "--shared"),
        (["--seed", "-1"], "--seed"),
        (["--against", "ftp://x"], "--against ftp://x: should be http://"),
        (["--against-key-env", "KEY"], "--against-key-env and --against-model go with --against URL"),
        (["--against-model", "m"], "--against-key-env and --against-model go with --against URL"),
        (["--api-key-env", "NOT_SET_ANYWHERE"], "--api-key-env NOT_SET_ANYWHERE: not set"),
        (["parallel.tensor=2"], "parallel.tensor=2: overrides a recipe; --recipe names none"),
        (["--recipe", "no-such"], "no-such"),
        (["--recipe", "demo", "kv_cache.memory=4KiB"], "--recipe demo does not fit: kv_cache.memory"),
        (["--out", "/proc/no/such"], "--out /proc/no/such: cannot be written"),
        (["--out", "/etc/hostname"], "--out /etc/hostname: cannot be written"),
    ],
)
def test_bad_options_are_refused_before_the_server_is_asked(arguments: list[str], message: str) -> None:
    result = bench("http://127.0.0.1:9", *arguments)
    assert (result.exit_code, message in result.stderr) == (2, True), result.output


def test_a_bad_url_is_refused_by_its_option() -> None:
    result = bench("127.0.0.1:8000")
    assert (result.exit_code, "--url 127.0.0.1:8000: should be http" in result.stderr) == (2, True)
