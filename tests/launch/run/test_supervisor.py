"""The launch command with dummy roles: start, drain, interrupts, and every failure of a process.

Real processes, sockets and signals; only the roles do no work
(``support/launch/dummy_cluster.py``).
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from lockstep.launch.cluster.reaper import marked
from support.launch.clusters import until
from support.launch.launch_dummies import HASTE
from support.launch.launcher import Launcher

LOCAL = "cluster.backend=local"


def launch(
    folder: Path, *arguments: str, dummy: str = "", environment: dict[str, str] | None = None
) -> Launcher:
    fixed = ("--recipe", "demo", "frontend.port=0", *arguments)
    return Launcher(
        folder,
        *fixed,
        module="support.launch.launch_dummies",
        environment={"DUMMY": dummy} | (environment or {}),
    )


def starts(launcher: Launcher, name: str) -> int:
    """The process of ``role index``; 0 while there is none."""
    with contextlib.suppress(AssertionError):
        return launcher.pid_of(name)
    return 0


def error_line(launcher: Launcher) -> str:
    [line] = [line for line in launcher.err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in launcher.err
    return line.removeprefix("error: ")


@pytest.mark.parametrize(
    ("number", "backend"),
    [(signal.SIGTERM, LOCAL), pytest.param(signal.SIGINT, "cluster.backend=ray", marks=pytest.mark.ray)],
)
def test_serves_until_told_to_stop_and_leaves_nothing(
    backend: str, number: signal.Signals, tmp_path: Path
) -> None:
    with launch(tmp_path, backend) as launcher:
        url = launcher.url()
        with urllib.request.urlopen(f"{url.removesuffix('/v1')}/health", timeout=60) as response:
            assert response.status == 200
        launcher.signal(number)
        assert launcher.wait() == 0
        launcher.assert_nothing_left()
        assert f"{number.name}: draining" in launcher.err
        assert "drained; stopping" in launcher.err
        assert not list(launcher.temporary.iterdir()), "the run's folder stays only after a failure"


def test_the_ready_text_shows_the_key_and_a_timeline(tmp_path: Path) -> None:
    with launch(
        tmp_path, LOCAL, "frontend.api_keys=[sesame]", "frontend.host=0.0.0.0", "model.served_name=m1"
    ) as launcher:
        url = launcher.url()
        until(lambda: "a second one stops at once" in launcher.out, "all of the ready text")
        for text in (
            f"curl {url}/chat/completions",
            "Bearer sesame",
            f'base_url="{url}"',
            'api_key="sesame"',
            "serves m1",
        ):
            assert text in launcher.out
        load = r"load [\d.]+ \(slowest: rank [01] on \S+\)"
        elsewhere = f"from other hosts: http://{socket.gethostname()}:{url.rpartition(':')[2]}\n"
        phases = rf"cluster [\d.]+, controller [\d.]+, {load}, frontend [\d.]+, first token [\d.]+"
        assert re.search(rf"s \({phases}\)\n{elsewhere}", launcher.out)


def test_ctrl_c_to_the_whole_foreground_group_drains(tmp_path: Path) -> None:
    with launch(tmp_path, LOCAL) as launcher:
        launcher.url()
        os.killpg(launcher.process.pid, signal.SIGINT)
        assert launcher.wait() == 0
        launcher.assert_nothing_left()


@pytest.mark.ray
def test_sigterm_to_everything_ends_in_time_and_leaves_nothing(tmp_path: Path) -> None:
    """As systemd does by default: SIGTERM to roles, Ray's processes and launcher at once."""
    with launch(tmp_path) as launcher:
        launcher.url()
        for process in launcher.seen:
            with contextlib.suppress(
                psutil.NoSuchProcess
            ):  # one of Ray's may have gone with the one before it
                process.terminate()
        launcher.signal()
        launcher.wait()
        launcher.assert_nothing_left()


def test_a_second_ctrl_c_kills_at_once(tmp_path: Path) -> None:
    with launch(tmp_path, LOCAL, "cluster.drain_deadline=60", dummy="controller 0: undrained") as launcher:
        launcher.url()
        launcher.signal(signal.SIGINT)
        until(
            lambda: "SIGINT: draining" in launcher.err,
            "the first to be heard; a second one at once would be the same",
        )
        time.sleep(0.5)
        assert launcher.process.poll() is None
        launcher.signal(signal.SIGINT)
        assert launcher.wait() == 1
        launcher.assert_nothing_left()
        assert "stopped at once" in error_line(launcher)


def test_a_drain_that_never_ends_has_a_deadline(tmp_path: Path) -> None:
    with launch(tmp_path, LOCAL, "cluster.drain_deadline=0.5", dummy="controller 0: undrained") as launcher:
        launcher.url()
        launcher.signal()
        assert launcher.wait() == 1
        assert "cluster.drain_deadline" in error_line(launcher)
        launcher.assert_nothing_left()


def test_what_does_not_stop_is_killed_and_named(tmp_path: Path) -> None:
    with launch(tmp_path, LOCAL, dummy="rank 0: deaf") as launcher:
        launcher.url()
        launcher.signal()
        assert launcher.wait() == 1
        assert "rank 0 did not stop in 1 s; terminating it" in launcher.err
        launcher.assert_nothing_left()


@pytest.mark.parametrize("moment", ["starting 2 ranks", "rank 1: ready"])
def test_sigterm_before_it_is_ready(moment: str, tmp_path: Path) -> None:
    with launch(tmp_path, LOCAL, dummy="rank 0: wait") as launcher:
        until(lambda: moment in launcher.err, moment, 30.0)
        launcher.look()
        launcher.signal()
        assert launcher.wait() == 1
        assert error_line(launcher) == "SIGTERM before the cluster was ready"
        launcher.assert_nothing_left()


@pytest.mark.parametrize(
    ("dummy", "words"),
    [
        ("rank 1: fail", ["rank 1 on ", "failed: model.safetensors: truncated: 3 bytes"]),
        ("rank 1: die", ["rank 1 on ", "was killed by SIGKILL"]),
        ("rank 1: silent", ["rank 1 on ", "exited with status 0"]),
        ("rank 1: wait", ["not ready after 10 s: rank 1 (loading 50%)"]),
        ("controller 0: die", ["controller 0 on ", "was killed by SIGKILL"]),
        ("frontend 0: 503", ["GET /health/generate", "HTTP 503: no"]),
    ],
)
def test_a_failure_in_start_up_is_one_message(dummy: str, words: list[str], tmp_path: Path) -> None:
    deadline = 10 if dummy.endswith("wait") else 60  # long enough for the others to be ready
    with launch(tmp_path, LOCAL, f"cluster.start_deadline={deadline}", dummy=dummy) as launcher:
        assert launcher.wait() == 1
        line = error_line(launcher)
        assert all(word in line for word in words), line
        [folder] = launcher.temporary.iterdir()
        assert f"logs: {folder}" in launcher.err


@pytest.mark.ray
def test_a_failure_in_start_up_is_one_message_with_ray_too(tmp_path: Path) -> None:
    with launch(tmp_path, dummy="rank 1: fail") as launcher:
        assert launcher.wait() == 1
        assert "failed: model.safetensors: truncated: 3 bytes" in error_line(launcher)


def test_a_rank_that_does_not_come_back_is_one_message(tmp_path: Path) -> None:
    with launch(tmp_path, LOCAL, f"cluster.start_deadline={HASTE}") as launcher:
        launcher.url()
        os.kill(launcher.pid_of("rank 1"), signal.SIGKILL)
        assert launcher.wait() == 1
        line = error_line(launcher)
        assert line.startswith("rank 1 on ") and "was killed by SIGKILL" in line
        assert line.endswith("the cluster does not serve again after 1 s")
        launcher.assert_nothing_left()


def test_a_rank_that_raises_is_replaced_and_so_is_one_that_dies_while_it_loads(tmp_path: Path) -> None:
    with launch(tmp_path, LOCAL) as launcher:
        launcher.url()
        os.kill(launcher.pid_of("rank 1"), signal.SIGUSR1)
        until(lambda: launcher.err.count("rank 1: ready") == 2, "another rank 1")
        said = "failed: RuntimeError: CUDA error: an illegal memory access was encountered; starting another"
        assert said in launcher.err
        os.kill(launcher.pid_of("rank 1"), signal.SIGKILL)
        until(lambda: launcher.err.count("rank 1: loading") >= 3, "a third one")
        os.kill(launcher.pid_of("rank 1"), signal.SIGKILL)  # before it is ready, or just after
        until(lambda: launcher.err.count("rank 1: loading") >= 4, "a fourth one")
        assert "in its place in 0.05 s, requests wait" in launcher.err
        until(lambda: launcher.err.count("rank 1: ready") >= 3, "the fourth one")
        os.kill(launcher.pid_of("rank 1"), signal.SIGUSR2)  # another was lost, in a transport that ends so
        until(lambda: "ended with its epoch" in launcher.err, "its end")
        said = launcher.err[launcher.err.index("ended with its epoch") :].partition("\n")[0]
        assert said.endswith("starting another in its place, requests wait"), "no fault, and no delay"
        launcher.signal()
        assert launcher.wait() == 0, launcher.err
        launcher.assert_nothing_left()


def test_frontends_that_keep_dying_end_nothing(tmp_path: Path) -> None:
    with launch(tmp_path, LOCAL, "frontend.processes=2") as launcher:
        url = launcher.url().removesuffix("/v1")
        for times in range(1, 6):
            victim = launcher.pid_of("frontend 1")  # ready by now, or not
            os.kill(victim, signal.SIGKILL)
            until(lambda: launcher.err.count("its streams have ended") == times, "the line")  # noqa: B023
            with urllib.request.urlopen(f"{url}/health", timeout=60) as response:
                assert response.status == 200, "the other one serves"
            until(lambda: starts(launcher, "frontend 1") not in (0, victim), "another one")  # noqa: B023
        assert "in its place in 0.4 s, its streams have ended" in launcher.err
        launcher.signal()
        assert launcher.wait() == 0, launcher.err
        launcher.assert_nothing_left()


def test_a_controller_that_does_not_come_back_is_one_message(tmp_path: Path) -> None:
    with launch(tmp_path, LOCAL, f"cluster.start_deadline={HASTE}") as launcher:
        launcher.url()
        os.kill(launcher.pid_of("controller 0"), signal.SIGKILL)
        assert launcher.wait() == 1
        line = error_line(launcher)
        assert line.startswith("controller 0 on ") and "was killed by SIGKILL" in line
        assert line.endswith("the cluster does not serve again after 1 s")
        assert "starting another in its place, requests wait" in launcher.err
        launcher.assert_nothing_left()


@pytest.mark.ray
def test_the_death_of_rays_head_is_one_message_at_once(tmp_path: Path) -> None:
    with launch(tmp_path) as launcher:
        launcher.url()
        [head] = [process for process in launcher.seen if process.name() == "gcs_server"]
        head.kill()
        until(lambda: "error: " in launcher.err, "the error")
        assert re.fullmatch(
            r"Ray's head process, which listened at \S+, has died; its processes go with it",
            error_line(launcher),
        )
        assert launcher.wait() == 1
        launcher.assert_nothing_left()


@pytest.mark.parametrize("backend", [LOCAL, pytest.param("cluster.backend=ray", marks=pytest.mark.ray)])
def test_kill_9_of_the_launcher_leaves_nothing(backend: str, tmp_path: Path) -> None:
    with launch(tmp_path, backend) as launcher:
        launcher.url()
        [mark] = {
            process.environ()["LOCKSTEP_RUN"]
            for process in launcher.seen
            if "LOCKSTEP_RUN" in process.environ()
        }
        assert len(marked(mark)) >= 4
        launcher.process.kill()
        launcher.wait()
        launcher.assert_nothing_left()
        assert marked(mark) == []


@pytest.mark.parametrize("terminal", [False, True], ids=["log", "terminal"])
def test_the_end_and_the_return_of_a_rank_are_a_line_each(terminal: bool, tmp_path: Path) -> None:
    with launch(
        tmp_path, LOCAL, environment={"FORCE_COLOR": "1", "TERM": "xterm"} if terminal else {}
    ) as launcher:
        launcher.url()
        before = len(launcher.err)
        os.kill(launcher.pid_of("rank 1"), signal.SIGKILL)
        until(lambda: "rank 1: ready" in launcher.err[before:], "another rank 1")
        time.sleep(0.3)  # in which nothing more may be said
        launcher.signal()
        assert launcher.wait() == 0
        said = launcher.err[before:]
        assert ("\x1b[" in said) == terminal
        for text in (
            "was killed by SIGKILL",
            "rank 1: loading",
            "rank 1: ready",
            "SIGTERM: draining",
            "drained; stopping",
        ):
            assert said.count(text) == 1, said
        assert said.count("\n") == 6, "there is another line"


RAY_TAKES_SIGTERM = """
import os, signal, time
from lockstep.launch import cli
from lockstep.launch.run import start
real = start.open_cluster
def open_cluster(run, reaper):
    signal.signal(signal.SIGTERM, lambda *_: os.abort())  # as Ray's C++ does while it connects
    print("opening", flush=True)
    end = time.monotonic() + 20
    while not run.interrupts.count and time.monotonic() < end:
        time.sleep(0.01)
    return real(run, reaper)
start.open_cluster = open_cluster
cli.main()
"""


def test_sigterm_reaches_the_launcher_while_ray_has_taken_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RAY_TAKES_SIGTERM, "--recipe", "demo", "frontend.port=0", LOCAL]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "opening\n"
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=90)
    assert process.returncode == 1
    assert "error: SIGTERM before the cluster was ready" in said


def test_sigterm_to_the_launcher_itself_that_ray_answers_is_an_interrupt_too(tmp_path: Path) -> None:
    code = "import sys\nfrom lockstep.launch import cli\nfrom lockstep.launch.run import start\n"
    code += "start.open_cluster = lambda run, reaper: sys.exit(15)\ncli.main()"
    command = [sys.executable, "-c", code, "--recipe", "demo", "frontend.port=0"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
    assert result.returncode == 1
    assert "error: SIGTERM before the cluster was ready" in result.stderr


def test_a_port_in_use_is_said_before_anything_starts(tmp_path: Path) -> None:
    with launch(tmp_path / "a", LOCAL) as first:
        port = first.url().removesuffix("/v1").rpartition(":")[2]
        with launch(tmp_path / "b", LOCAL, f"frontend.port={port}") as second:
            assert second.wait() == 1
            assert f"frontend.port = {port}: cannot be listened on: Address already in use" in error_line(
                second
            )
            assert "starting the controller" not in second.err
            assert "logs:" not in second.err, "there are none"
            assert not list(second.temporary.iterdir())


def test_a_library_for_gpus_on_cpus_is_said_before_anything_starts(tmp_path: Path) -> None:
    with launch(tmp_path, LOCAL, "kernels.linear_fp8=deep_gemm") as launcher:
        assert launcher.wait() == 2
        assert "kernels.linear_fp8 = deep_gemm: is for ranks on GPUs" in launcher.err
        assert "starting the controller" not in launcher.err
