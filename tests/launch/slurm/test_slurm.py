"""``launch slurm``: the script's requests to Slurm, and refused options."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from lockstep.launch.commands.main import app
from lockstep.launch.slurm.job import parse_time

CUDA = ("cluster.device=cuda", "cluster.nodes=2", "cluster.ranks_per_node=4")


def call(*arguments: str, recipe: str = "demo-two-hosts") -> Result:
    return CliRunner().invoke(app, ["slurm", "--recipe", recipe, *arguments])


def script(*arguments: str, recipe: str = "demo-two-hosts") -> str:
    result = call(*arguments, recipe=recipe)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def options(text: str) -> dict[str, str]:
    """The #SBATCH lines, read as sbatch reads them."""
    lines = [
        shlex.split(line.removeprefix("#SBATCH "))[0]
        for line in text.splitlines()
        if line.startswith("#SBATCH ")
    ]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def variable(text: str, name: str) -> list[str]:
    """A variable that the script sets before its body, as bash sees it."""
    head = text.partition("\n# -----")[0]
    done = subprocess.run(
        ["bash", "-c", f'{head}\nprintf "%s\\n" "${{{name}[@]}}"'],
        capture_output=True,
        text=True,
        check=True,
        timeout=10,
    )
    return done.stdout.splitlines()


def refusal(*arguments: str, recipe: str = "demo-two-hosts") -> str:
    result = call(*arguments, recipe=recipe)
    assert result.exit_code == 2, result.stdout
    assert result.stdout == ""
    return str(result.stderr)


def test_the_script_is_bash_with_nothing_left_to_fill_in(tmp_path: Path) -> None:
    for arguments in ((), ("--cpus=2", "--time=1-0"), (*CUDA, "--container-image=registry#lockstep:1")):
        path = tmp_path / "job.sh"
        path.write_text(script(*arguments))
        subprocess.run(["bash", "-n", str(path)], check=True, timeout=10)
        assert not any(word in path.read_text() for word in ("TODO", "FIXME", "CHANGE", "YOUR", "None"))
        if shutil.which("shellcheck"):
            subprocess.run(["shellcheck", str(path)], check=True, timeout=60)


def test_nodes_and_gpus_come_from_the_recipe() -> None:
    cpu, cuda = options(script()), options(script(*CUDA))
    assert (cpu["--nodes"], cpu["--ntasks-per-node"], "--gpus-per-node" in cpu) == ("2", "1", False)
    assert (cuda["--nodes"], cuda["--gpus-per-node"]) == ("2", "4")
    assert {"--exclusive", "--no-kill", "--no-requeue"} <= set(cpu)
    assert cpu["--mem"] == "0"
    assert options(script("--nodes=2"))["--nodes"] == "2"
    assert options(script(*CUDA, "--spare=1"))["--nodes"] == "3"
    assert variable(script(*CUDA, "--spare=1"), "num_nodes") == ["3"]
    assert variable(script(*CUDA), "cpus") == ["6", "4"]  # four ranks, a controller and a frontend
    assert variable(script(*CUDA, "frontend.processes=3"), "cpus") == ["8", "4"]
    assert variable(script(*CUDA), "gpus") == ["4"]


def test_a_rack_gets_its_script() -> None:
    text = script(recipe="deepseek-gb200")
    found = options(text)
    assert (found["--nodes"], found["--gpus-per-node"]) == ("18", "4")
    assert (variable(text, "num_nodes"), variable(text, "gpus")) == (["18"], ["4"])
    assert any("deepseek-gb200" in line for line in text.splitlines() if not line.startswith("#"))


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        (("--partition", "long"), "--partition", "long"),
        (("--account", "team"), "--account", "team"),
        (("--qos", "high"), "--qos", "high"),
        (("--time", "2-00:00:00"), "--time", "2-00:00:00"),
        (("--cpus", "16"), "--cpus-per-task", "16"),
        (("--mem", "64G"), "--mem", "64G"),
        (("--constraint", "h100&ib"), "--constraint", "h100&ib"),
        (("--nodelist", "node[1-2]"), "--nodelist", "node[1-2]"),
        (("--exclude", "node7"), "--exclude", "node7"),
        (("--reservation", "res"), "--reservation", "res"),
        (("--name", "mine"), "--job-name", "mine"),
        (("--folder", "/shared/my jobs"), "--output", "/shared/my jobs/lockstep-%j.out"),
        (("--sbatch", '--comment=two words, "quoted"'), "--comment", 'two words, "quoted"'),
        (("--requeue",), "--requeue", ""),
        (("cluster.drain_deadline=100.5",), "--signal", "B:TERM@161"),
    ],
)
def test_every_option_lands(given: tuple[str, ...], name: str, value: str) -> None:
    assert options(script(*given))[name] == value


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        (("--port", "9000"), "port", ["9000"]),
        (("--interface", "ib0"), "interface", ["ib0"]),
        (("--bin", "/opt/lockstep/bin"), "bin", ["/opt/lockstep/bin/"]),
        (("--scratch", "/local"), "scratch", ["/local"]),
        (("--folder", "/shared/my jobs"), "folder", ["/shared/my jobs/"]),
        (("--no-check",), "check", [""]),
        (("frontend.host=127.0.0.1",), "host", [""]),
        (("frontend.host=10.1.2.3",), "host", ["10.1.2.3"]),
        (("--container-image", "x.sqsh"), "image", ["x.sqsh"]),
        (("--container-image", "x.sqsh"), "bin", [""]),
        (
            ("model.served_name=it's $HOME",),
            "recipe",
            ["--recipe", "demo-two-hosts", "model.served_name=it's $HOME"],
        ),
    ],
)
def test_every_setting_lands(given: tuple[str, ...], name: str, value: list[str]) -> None:
    assert variable(script(*given), name) == value


def test_gres_stands_in_for_gpus_per_node() -> None:
    found = options(script(*CUDA, "--gres=gpu:h100:8,nvme:1"))
    assert found["--gres"] == "gpu:h100:8,nvme:1"
    assert "--gpus-per-node" not in found


def test_a_recipe_of_ones_own_is_named_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text("model: {path: weights}\ncluster: {device: cpu}\n")
    monkeypatch.chdir(tmp_path)
    text = script(
        "model.path=other", "--container-image=x", "--container-mount=/data:/data", recipe="mine.yaml"
    )
    assert variable(text, "recipe") == [
        "--recipe",
        str(tmp_path / "mine.yaml"),
        f"model.path={tmp_path}/other",
    ]
    assert variable(text, "mounts") == [
        f"/data:/data,{tmp_path}:{tmp_path},{tmp_path}/other:{tmp_path}/other"
    ]
    assert options(text)["--job-name"] == "lockstep-mine"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--nodes", "3"), ["--nodes 3", "cluster.nodes = 2", "cluster.nodes=3"]),
        (("cluster.device=auto",), ["cluster.device = auto", "cluster.device=cuda"]),
        ((*CUDA, "--gres=gpu:h100:2"), ["--gres gpu:h100:2", "2 GPUs", "cluster.ranks_per_node = 4"]),
        ((*CUDA, "--gres=nvme:1"), ["--gres nvme:1", "0 GPUs"]),
        (("--gres=gpu:1",), ["--gres gpu:1", "cluster.device = cpu"]),
        ((*CUDA, "--cpus=3"), ["--cpus 3", "cluster.ranks_per_node = 4"]),
        (("--time=soon",), ["--time soon", "hours:minutes:seconds"]),
        (("--time=1:30",), ["--time 1:30", "90 s", "cluster.drain_deadline = 30"]),
        (("--name=a b",), ["--name a b"]),
        (("cluster.address=head:6379",), ["cluster.address = head:6379"]),
        (("frontend.port=0",), ["frontend.port = 0"]),
        (("--partition=a\n#SBATCH --nodes=9",), ["--partition", "one line"]),
        (("--sbatch=comment",), ["--sbatch comment"]),
        (("--container-mount=/a:/a",), ["--container-image"]),
        (("frontend.prot=1",), ["frontend.prot", "frontend.port"]),
    ],
)
def test_what_does_not_fit_is_refused_by_name(given: tuple[str, ...], words: list[str]) -> None:
    said = refusal(*given)
    assert all(word in said for word in words), said


def test_every_problem_is_said_at_once() -> None:
    said = refusal("--nodes=3", "--time=soon", "--name=a b")
    assert all(word in said for word in ("--nodes 3", "--time soon", "--name a b"))


def test_a_recipe_for_one_machine_is_refused(tmp_path: Path) -> None:
    (tmp_path / "local.yaml").write_text("model: {path: weights}\ncluster: {device: cpu, backend: local}\n")
    assert "cluster.backend = local" in refusal(recipe=str(tmp_path / "local.yaml"))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),
        ("30:15", 1815),
        ("2:00:00", 7200),
        ("1-12", 129600),
        ("1-0:30", 88200),
        ("1-0:0:9", 86409),
        ("", None),
        ("1h", None),
        ("1:2:3:4", None),
    ],
)
def test_time_limits_are_read_as_slurm_reads_them(text: str, seconds: int | None) -> None:
    assert parse_time(text) == seconds
