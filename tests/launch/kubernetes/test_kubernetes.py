"""``launch k8s``: manifests that Kubernetes and its operators accept, and refused options."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from typer.testing import CliRunner, Result

from lockstep.launch.commands.main import app
from support.launch import crds

Document = dict[str, Any]
CUDA = ("cluster.device=cuda", "cluster.ranks_per_node=8")
ALL = ("--max-replicas=4", "--endpoint-picker=picker", "--rdma=rdma/ib=8", "--node-selector=pool=h200")


def call(*arguments: str, recipe: str = "demo-two-hosts") -> Result:
    return CliRunner().invoke(app, ["k8s", "--recipe", recipe, *arguments])


def documents(*arguments: str, recipe: str = "demo-two-hosts") -> dict[str, Document]:
    """The documents by kind."""
    result = call(*arguments, recipe=recipe)
    assert result.exit_code == 0, result.stderr
    return {document["kind"]: document for document in yaml.safe_load_all(result.stdout)}


def refusal(*arguments: str, recipe: str = "demo-two-hosts") -> str:
    result = call(*arguments, recipe=recipe)
    assert (result.exit_code, result.stdout) == (2, "")
    return str(result.stderr)


def templates(found: dict[str, Document]) -> dict[str, Document]:
    """Pod templates by component."""
    if "RayCluster" in found:
        spec = found["RayCluster"]["spec"]
        groups = [spec["headGroupSpec"], *spec.get("workerGroupSpecs", ())]
        made = [group["template"] for group in groups]
    else:
        group = found["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]
        made = [group[name] for name in ("leaderTemplate", "workerTemplate") if name in group]
    return {template["metadata"]["labels"]["app.kubernetes.io/component"]: template for template in made}


def container(found: dict[str, Document], component: str = "leader") -> Document:
    [only] = templates(found)[component]["spec"]["containers"]
    return dict(only)


def own_recipe(folder: Path, *lines: str) -> str:
    text = "model: {path: models/mine}\ncluster: {device: cuda, nodes: 2, ranks_per_node: 8}\n"
    path = folder / "Mine_1.yaml"
    path.write_text(text + "\n".join(lines))
    return str(path)


@pytest.mark.parametrize("kuberay", [(), ("--kuberay",)], ids=["groups", "kuberay"])
@pytest.mark.parametrize("shape", [(), CUDA, ("cluster.nodes=1",), ("--spare=1",)])
def test_kubernetes_knows_every_field(shape: tuple[str, ...], kuberay: tuple[str, ...]) -> None:
    given = (*shape, *kuberay, *(ALL[1:] if kuberay else ALL))
    found = documents(*given, "--memory=64Gi", "--model-claim=models", "--kernel-claim=kernels/mine")
    version = kubernetes_validate.latest_version()
    for component, template in templates(found).items():
        pod = {"apiVersion": "v1", "kind": "Pod", **template}
        pod["metadata"] = {**template["metadata"], "name": component}
        kubernetes_validate.validate(pod, version, strict=True)
    for kind in found.keys() - crds.KINDS:
        kubernetes_validate.validate(found[kind], version, strict=True)


@pytest.mark.parametrize("kind", sorted(crds.KINDS))
def test_operators_know_every_field(kind: str) -> None:
    given = ("--kuberay", *CUDA) if kind == "RayCluster" else (*ALL, *CUDA)
    document = documents(*given)[kind]
    crds.check(document)
    document["spec"]["unheard"] = 1
    with pytest.raises(jsonschema.ValidationError, match="unheard"):
        crds.check(document)


def test_a_strict_schema_looks_into_pods() -> None:
    document = documents()["LeaderWorkerSet"]
    group = document["spec"]["leaderWorkerTemplate"]
    group["leaderTemplate"]["spec"]["containers"][0]["startupProbe"]["unheard"] = 1
    with pytest.raises(jsonschema.ValidationError, match="unheard"):
        crds.check(document)


def test_one_pod_is_replaced_not_the_group_and_it_has_time_to_drain() -> None:
    found = documents("cluster.drain_deadline=40.5")
    group = found["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]
    assert (group["restartPolicy"], group["size"]) == ("None", 2)
    for template in templates(found).values():
        assert template["spec"]["terminationGracePeriodSeconds"] == 5 + 41 + 60
    leader = container(found)
    assert leader["startupProbe"]["httpGet"] == {"path": "/health", "port": "http"}
    assert leader["startupProbe"]["failureThreshold"] * leader["startupProbe"]["periodSeconds"] == 1200
    assert leader["readinessProbe"]["httpGet"] == {"path": "/ready", "port": "http"}
    assert "livenessProbe" not in leader


def test_gpus_rdma_memory_and_the_model_come_from_recipe_and_options(tmp_path: Path) -> None:
    recipe = own_recipe(tmp_path)
    found = documents("--rdma=rdma/ib=8", "--shm=32Gi", "--memory=1Ti", recipe=recipe)
    for component, cpus in (("leader", "10"), ("worker", "8")):
        pod = container(found, component)
        limits = {"memory": "1Ti", "nvidia.com/gpu": "8", "rdma/ib": "8"}
        assert pod["resources"] == {"requests": {"cpu": cpus, "memory": "1Ti"}, "limits": limits}
        assert pod["securityContext"] == {"capabilities": {"add": ["IPC_LOCK"]}}
        mounts = {mount["name"]: mount for mount in pod["volumeMounts"]}
        assert mounts["shm"]["mountPath"] == "/dev/shm"
        assert mounts["model"]["mountPath"] == str(tmp_path / "models" / "mine")
        assert mounts["model"]["readOnly"]
    volumes = {volume["name"]: volume for volume in templates(found)["leader"]["spec"]["volumes"]}
    assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "32Gi"}
    assert volumes["model"]["hostPath"]["path"] == str(tmp_path / "models" / "mine")
    assert volumes["recipe"] == {"name": "recipe", "configMap": {"name": "lockstep-mine-1-recipe"}}
    assert found["ConfigMap"]["data"] == {"Mine_1.yaml": Path(recipe).read_text()}
    claimed = documents("--model-claim=models/mine", recipe=recipe)
    assert "persistentVolumeClaim" in str(templates(claimed)["worker"]["spec"]["volumes"])
    assert {"subPath": "mine"}.items() <= {
        name: value for mount in container(claimed)["volumeMounts"] for name, value in mount.items()
    }.items()


def test_compiled_kernels_outlive_the_container_and_with_a_claim_the_pod() -> None:
    for given, source in (
        ((), {"emptyDir": {}}),
        (("--kernel-claim=kernels/mine",), {"persistentVolumeClaim": {"claimName": "kernels"}}),
    ):
        found = documents(*given)
        for component, template in templates(found).items():
            assert {"name": "kernels", **source} in template["spec"]["volumes"]
            [mount] = [
                each for each in container(found, component)["volumeMounts"] if each["name"] == "kernels"
            ]
            folder = mount.pop("mountPath")
            assert mount == {"name": "kernels"} | ({"subPath": "mine"} if given else {})
            names = {entry["name"]: entry.get("value") for entry in container(found, component)["env"]}
            assert names["NUMBA_CACHE_DIR"] == folder
            assert names["TRITON_CACHE_DIR"] == f"{folder}/triton"


def test_a_recipe_with_keys_is_a_secret_and_no_key_stands_in_a_command(tmp_path: Path) -> None:
    recipe = own_recipe(tmp_path, "frontend: {api_keys: [sesame], admin_key: master}")
    found = documents(recipe=recipe)
    assert "ConfigMap" not in found and "sesame" in found["Secret"]["stringData"]["Mine_1.yaml"]
    assert "sesame" not in str(found["LeaderWorkerSet"]) and "master" not in str(found["LeaderWorkerSet"])
    assert "secret" in str(templates(found)["leader"]["spec"]["volumes"])
    assert "frontend.admin_key" in refusal("frontend.admin_key=master")


def test_services_monitors_and_pools_select_the_leaders() -> None:
    found = documents(*ALL)
    leader = templates(found)["leader"]["metadata"]["labels"]
    assert leader != templates(found)["worker"]["metadata"]["labels"]
    assert found["Service"]["spec"]["selector"] == leader
    assert found["PodMonitor"]["spec"]["selector"]["matchLabels"] == leader
    assert found["InferencePool"]["spec"]["selector"]["matchLabels"] == leader
    port = container(found)["ports"][0]
    assert found["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    assert found["PodMonitor"]["spec"]["podMetricsEndpoints"][0]["port"] == port["name"]
    assert found["InferencePool"]["spec"]["targetPorts"] == [{"number": port["containerPort"]}]
    one = documents("cluster.nodes=1", "frontend.port=9000")
    assert templates(one).keys() == {"leader"} and container(one)["ports"][0]["containerPort"] == 9000


def test_routers_reach_the_events_of_the_block_index() -> None:
    found = documents("kv_cache.events=tcp://0.0.0.0:5557", "kv_cache.events_replay=tcp://0.0.0.0:5558")
    assert container(found)["ports"][1:] == [
        {"name": "kv-events", "containerPort": 5557},
        {"name": "kv-replay", "containerPort": 5558},
    ]
    assert [port["targetPort"] for port in found["Service"]["spec"]["ports"]] == [
        "http",
        "kv-events",
        "kv-replay",
    ]


def test_scaling_reads_series_that_exist() -> None:
    from lockstep.engine.frontend.metrics.metrics import Metrics

    scaled = documents(*ALL)["ScaledObject"]["spec"]
    assert scaled["scaleTargetRef"]["kind"] == "LeaderWorkerSet"
    assert (scaled["minReplicaCount"], scaled["maxReplicaCount"]) == (1, 4)
    queries = " ".join(trigger["metadata"]["query"] for trigger in scaled["triggers"])
    names = re.findall(r"lockstep:\w+", queries)
    assert names == ["lockstep:num_requests_waiting", "lockstep:time_to_first_token_seconds_bucket"]
    assert names[1] in Metrics("demo").render(0).decode()
    assert "ScaledObject" not in documents()


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (("cluster.device=auto",), "cluster.device"),
        (("cluster.address=alpha:6379",), "cluster.address"),
        (("frontend.port=0",), "frontend.port"),
        (("--max-replicas=1", "--replicas=2"), "--max-replicas"),
        (("--kuberay", "--replicas=2"), "--kuberay"),
        (("--name=Upper",), "--name Upper"),
        (("--memory=lots",), "--memory lots"),
        (("--rdma=ib",), "--rdma ib"),
        (("--node-selector=pool",), "--node-selector pool"),
        (("cluster.nodes=1", "cluster.backend=local", "--spare=1"), "--spare 1"),
    ],
)
def test_a_contradiction_is_refused_by_name(given: tuple[str, ...], named: str) -> None:
    assert named in refusal(*given)


def test_the_token_is_read_from_a_secret_that_the_head_tells_how_to_make() -> None:
    text = call("--namespace=serving").stdout
    assert "kubectl create secret generic lockstep-demo-two-hosts-ray -n serving" in text
    env = {entry["name"]: entry for entry in container(documents())["env"]}
    reference = {"name": "lockstep-demo-two-hosts-ray", "key": "token"}
    assert env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == reference
    kuberay = documents("--kuberay")  # makes a token of its own
    assert "RAY_AUTH_TOKEN" not in {entry["name"] for entry in container(kuberay)["env"]}
    assert kuberay["RayCluster"]["spec"]["authOptions"] == {"mode": "token"}
