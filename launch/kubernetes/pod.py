"""The pods of a cluster: the leader runs ``launch`` and Ray's head, the others a node of Ray."""

from __future__ import annotations

import math
import shlex
from typing import Any

from ..environment import ray_settings
from .deployment import LEAVING_SECONDS, Deployment

RAY_PORT = 6379
RECIPE_FOLDER = "/etc/lockstep"
_LOG_FOLDER = "/var/log/lockstep"
_KERNEL_FOLDER = "/var/cache/lockstep"
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_WORKER = "python3 -P -m lockstep.launch.kubernetes.worker"
_PROBE_SECONDS = 5


def labels(deployment: Deployment, component: str = "leader") -> dict[str, str]:
    """Labels of a pod, and with the default those that select leaders."""
    return {"app.kubernetes.io/name": deployment.name, "app.kubernetes.io/component": component}


def leader(deployment: Deployment) -> dict[str, Any]:
    """The pod template of the leader, which serves."""
    deadline = deployment.recipe.cluster.start_deadline
    container = _container(deployment, _leader_script(deployment), deployment.num_beside)
    container |= {
        "ports": [{"name": name, "containerPort": port} for name, port in deployment.ports.items()],
        # launch itself ends a start that takes too long; this bounds it in any case.
        "startupProbe": _probe("/health", math.ceil(2 * deadline / _PROBE_SECONDS)),
        # No liveness probe: /health is 503 while a lost rank is replaced, and launch ends by itself
        # when it cannot go on.
        "readinessProbe": _probe("/ready", 2),
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(LEAVING_SECONDS)]}}},
    }
    return _pod(deployment, container, "leader")


def worker(deployment: Deployment) -> dict[str, Any]:
    """The pod template of the other nodes."""
    container = _container(deployment, _worker_script(deployment), 0)
    address = f"{_leader_address(deployment)}:{deployment.recipe.frontend.port}"
    seconds = deployment.grace_seconds - LEAVING_SECONDS
    outlast = f'exec {_WORKER} outlast "{address}" --seconds {seconds}'
    container["lifecycle"] = {"preStop": {"exec": {"command": ["bash", "-c", outlast]}}}
    return _pod(deployment, container, "worker")


def _leader_address(deployment: Deployment) -> str:
    """The variable that names the leader in the other pods."""
    return "$FQ_RAY_IP" if deployment.options.kuberay else "$LWS_LEADER_ADDRESS"


def _leader_script(deployment: Deployment) -> str:
    launch = f"exec launch {shlex.join(_arguments(deployment))}"
    if deployment.num_pods == 1:
        return f"{launch}\n"
    start = _ray_start(deployment, deployment.num_beside)
    head = f"{start} --head --port={RAY_PORT} --include-dashboard=false"
    return f'{head}\n{launch} "cluster.address=$POD_IP:{RAY_PORT}"\n'


def _worker_script(deployment: Deployment) -> str:
    address = f"{_leader_address(deployment)}:{RAY_PORT}"
    seconds = f"{deployment.recipe.cluster.start_deadline:g}"
    wait = f'{_WORKER} wait "{address}" --seconds {seconds}'
    return f'{wait}\nexec {_ray_start(deployment, 0)} "--address={address}" --block\n'


def _ray_start(deployment: Deployment, num_beside: int) -> str:
    """The start of Ray on a node with ``num_beside`` processes beside its ranks."""
    cpus = deployment.recipe.cluster.ranks_per_node + num_beside
    return (
        f'ray start "--node-ip-address=$POD_IP" --num-cpus={cpus} --num-gpus={deployment.gpus}'
        " --object-store-memory=100000000 --disable-usage-stats"
    )


def _arguments(deployment: Deployment) -> list[str]:
    """Arguments of ``launch``; the pod's own come last, so that they hold."""
    recipe, own = deployment.recipe, []
    name = deployment.recipe_name
    if deployment.recipe_text is not None:
        name = f"{RECIPE_FOLDER}/{name}"
    if deployment.model_path is not None:
        own.append(f"model.path={deployment.model_path}")
    if recipe.frontend.host in _LOOPBACK:
        own.append("frontend.host=0.0.0.0")
    if recipe.cluster.log_dir is None:
        own.append(f"cluster.log_dir={_LOG_FOLDER}")
    return ["--recipe", name, *deployment.overrides, *own]


def _probe(path: str, failures: int) -> dict[str, Any]:
    return {
        "httpGet": {"path": path, "port": "http"},
        "periodSeconds": _PROBE_SECONDS,
        "timeoutSeconds": _PROBE_SECONDS,
        "failureThreshold": failures,
    }


def _container(deployment: Deployment, script: str, num_beside: int) -> dict[str, Any]:
    container: dict[str, Any] = {
        "name": "lockstep",
        "image": deployment.options.image,
        "command": ["bash", "-ec", script],
        "env": _environment(deployment),
        "resources": _resources(deployment, num_beside),
        "volumeMounts": [mount for mount, _ in _volumes(deployment)],
    }
    if deployment.options.rdma:  # RDMA pins memory
        container["securityContext"] = {"capabilities": {"add": ["IPC_LOCK"]}}
    return container


def _environment(deployment: Deployment) -> list[dict[str, Any]]:
    env: list[dict[str, Any]] = [
        {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        {"name": "NUMBA_CACHE_DIR", "value": _KERNEL_FOLDER},
        {"name": "TRITON_CACHE_DIR", "value": f"{_KERNEL_FOLDER}/triton"},
        *({"name": name, "value": value} for name, value in ray_settings().items()),
    ]
    if deployment.num_pods > 1 and not deployment.options.kuberay:  # KubeRay makes a token of its own
        key = {"name": f"{deployment.name}-ray", "key": "token"}
        env.append({"name": "RAY_AUTH_MODE", "value": "token"})
        env.append({"name": "RAY_AUTH_TOKEN", "valueFrom": {"secretKeyRef": key}})
    return env


def _resources(deployment: Deployment, num_beside: int) -> dict[str, Any]:
    """One GPU for each rank, the RDMA devices, CPUs and memory."""
    options, cluster = deployment.options, deployment.recipe.cluster
    cpus = cluster.ranks_per_node * (cluster.threads or 1) + num_beside
    requests = {"cpu": options.cpus or str(cpus)}
    limits: dict[str, str] = {}
    if options.memory is not None:
        requests["memory"] = limits["memory"] = options.memory
    if deployment.gpus:
        limits[options.gpu_resource] = str(deployment.gpus)
    for resource in options.rdma:
        name, _, count = resource.partition("=")
        limits[name] = count
    return {"requests": requests, "limits": limits} if limits else {"requests": requests}


def _volumes(deployment: Deployment) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(mount, volume) of shared memory, logs, compiled kernels, model and recipe."""
    options = deployment.options
    shm = options.shm or ("16Gi" if deployment.gpus else "2Gi")
    found: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"mountPath": "/dev/shm"}, {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": shm}}),
        ({"mountPath": _LOG_FOLDER}, {"name": "logs", "emptyDir": {}}),
    ]
    mount: dict[str, Any] = {"mountPath": _KERNEL_FOLDER}
    if options.kernel_claim is None:
        found.append((mount, {"name": "kernels", "emptyDir": {}}))
    else:
        found.append(_claimed("kernels", mount, options.kernel_claim))
    if deployment.model_path is not None:
        path = str(deployment.model_path)
        mount = {"mountPath": path, "readOnly": True}
        if options.model_claim is None:
            found.append((mount, {"name": "model", "hostPath": {"path": path, "type": "Directory"}}))
        else:
            found.append(_claimed("model", mount, options.model_claim))
    if deployment.recipe_text is not None:
        source = f"{deployment.name}-recipe"
        kind = {"secret": {"secretName": source}} if deployment.has_keys else {"configMap": {"name": source}}
        found.append(({"mountPath": RECIPE_FOLDER, "readOnly": True}, {"name": "recipe", **kind}))
    return [({"name": volume["name"], **mount}, volume) for mount, volume in found]


def _claimed(name: str, mount: dict[str, Any], claim: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(mount, volume) of CLAIM[/FOLDER]."""
    claim_name, _, folder = claim.partition("/")
    source: dict[str, Any] = {"claimName": claim_name}
    if mount.get("readOnly"):
        source["readOnly"] = True
    return mount | ({"subPath": folder} if folder else {}), {"name": name, "persistentVolumeClaim": source}


def _pod(deployment: Deployment, container: dict[str, Any], component: str) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "terminationGracePeriodSeconds": deployment.grace_seconds,
        "shareProcessNamespace": True,  # its first process reaps those that Ray leaves
        "containers": [container],
        "volumes": [volume for _, volume in _volumes(deployment)],
    }
    if deployment.options.node_selector:
        pairs = (entry.partition("=") for entry in deployment.options.node_selector)
        spec["nodeSelector"] = {label: value for label, _, value in pairs}
    return {"metadata": {"labels": labels(deployment, component)}, "spec": spec}
