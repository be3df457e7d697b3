"""The manifests of a deployment: the documents, and their text."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from typing import Any

import yaml

from .deployment import Deployment
from .pod import labels, leader, worker

Document = dict[str, Any]

# Thresholds that operators use (OPERATIONS.md): waiting requests of a replica, seconds to a first
# token.
_QUEUE = 10
_FIRST_TOKEN = 5


def manifest(deployment: Deployment) -> str:
    """All documents as YAML, after a head that says how to use them."""
    parts = [yaml.dump(document, Dumper=_Dumper, sort_keys=False) for document in documents(deployment)]
    return "\n".join(_head(deployment)) + "\n---\n" + "---\n".join(parts)


def documents(deployment: Deployment) -> Iterator[Document]:
    options = deployment.options
    if deployment.recipe_text is not None:
        kind = "Secret" if deployment.has_keys else "ConfigMap"
        field = "stringData" if deployment.has_keys else "data"
        name = f"{deployment.name}-recipe"
        text = {deployment.recipe_name: deployment.recipe_text}
        yield {**_object(deployment, "v1", kind, name), field: text}
    yield _service(deployment)
    yield _ray_cluster(deployment) if options.kuberay else _leader_worker_set(deployment)
    yield _pod_monitor(deployment)
    if options.max_replicas is not None:
        yield _scaled_object(deployment, options.max_replicas)
    if options.endpoint_picker is not None:
        yield _inference_pool(deployment, options.endpoint_picker)


def _object(deployment: Deployment, version: str, kind: str, name: str = "") -> Document:
    """The head of a document."""
    metadata = {
        "name": name or deployment.name,
        "namespace": deployment.options.namespace,
        "labels": {"app.kubernetes.io/name": deployment.name},
    }
    return {"apiVersion": version, "kind": kind, "metadata": metadata}


def _service(deployment: Deployment) -> Document:
    ports = [{"name": name, "port": port, "targetPort": name} for name, port in deployment.ports.items()]
    return {
        **_object(deployment, "v1", "Service"),
        "spec": {"selector": labels(deployment), "ports": ports},
    }


def _leader_worker_set(deployment: Deployment) -> Document:
    """A group is a cluster. Its pods are replaced one by one: requests wait meanwhile."""
    template: Document = {"size": deployment.num_pods, "restartPolicy": "None"}
    if deployment.num_pods > 1:
        template |= {"leaderTemplate": leader(deployment), "workerTemplate": worker(deployment)}
    else:
        template["workerTemplate"] = leader(deployment)
    return {
        **_object(deployment, "leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet"),
        "spec": {
            "replicas": deployment.options.replicas,
            "startupPolicy": "LeaderCreated",
            "leaderWorkerTemplate": template,
        },
    }


def _ray_cluster(deployment: Deployment) -> Document:
    """The same pods under KubeRay, with our commands in place of those it would generate."""
    document = _object(deployment, "ray.io/v1", "RayCluster")
    document["metadata"]["annotations"] = {"ray.io/overwrite-container-cmd": "true"}
    num = deployment.num_pods - 1
    spec: Document = {"headGroupSpec": {"rayStartParams": {}, "template": leader(deployment)}}
    if num:
        counts = {"replicas": num, "minReplicas": num, "maxReplicas": num}
        group = {"groupName": "workers", **counts, "rayStartParams": {}, "template": worker(deployment)}
        spec = {"authOptions": {"mode": "token"}, **spec, "workerGroupSpecs": [group]}
    return {**document, "spec": spec}


def _pod_monitor(deployment: Deployment) -> Document:
    endpoint = {"port": "http", "path": "/metrics", "interval": "15s"}
    return {
        **_object(deployment, "monitoring.coreos.com/v1", "PodMonitor"),
        "spec": {"selector": {"matchLabels": labels(deployment)}, "podMetricsEndpoints": [endpoint]},
    }


def _scaled_object(deployment: Deployment, most: int) -> Document:
    """Adds clusters while requests queue or first tokens come late."""
    pods = f'namespace="{deployment.options.namespace}", pod=~"{deployment.name}-.+"'
    buckets = f"sum by (le) (rate(lockstep:time_to_first_token_seconds_bucket{{{pods}}}[2m]))"
    queries = {
        "AverageValue": (f"sum(lockstep:num_requests_waiting{{{pods}}})", _QUEUE),
        # Without traffic the quantile is no number, which counts as 0.
        "Value": (f"(histogram_quantile(0.99, {buckets}) > 0) or vector(0)", _FIRST_TOKEN),
    }
    triggers = [
        {
            "type": "prometheus",
            "metricType": kind,
            "metadata": {
                "serverAddress": deployment.options.prometheus,
                "query": query,
                "threshold": str(threshold),
            },
        }
        for kind, (query, threshold) in queries.items()
    ]
    target = {"apiVersion": "leaderworkerset.x-k8s.io/v1", "kind": "LeaderWorkerSet", "name": deployment.name}
    return {
        **_object(deployment, "keda.sh/v1alpha1", "ScaledObject"),
        "spec": {
            "scaleTargetRef": target,
            "minReplicaCount": deployment.options.replicas,
            "maxReplicaCount": most,
            "cooldownPeriod": 300,
            "triggers": triggers,
        },
    }


def _inference_pool(deployment: Deployment, picker: str) -> Document:
    return {
        **_object(deployment, "inference.networking.k8s.io/v1", "InferencePool"),
        "spec": {
            "selector": {"matchLabels": labels(deployment)},
            "targetPorts": [{"number": deployment.recipe.frontend.port}],
            "endpointPickerRef": {"name": picker, "port": {"number": 9002}},
        },
    }


def _head(deployment: Deployment) -> Iterator[str]:
    """Comments: what it serves, and the commands to apply it."""
    options, cluster = deployment.options, deployment.recipe.cluster
    written = " ".join(["launch", *map(shlex.quote, sys.argv[1:])]).replace("\n", " ")
    space = f"-n {options.namespace}"
    spare = f", {options.spare} of them spare" if options.spare else ""
    yield f"# Serves {deployment.recipe_name}. Pods of a cluster: {deployment.num_pods}{spare}."
    yield f"# Written by: {written}"
    yield "#"
    if deployment.num_pods > 1 and not options.kuberay:
        yield "# Ray's token, once:"
        yield f"#   kubectl create secret generic {deployment.name}-ray {space} \\"
        yield "#     --from-literal=token=$(openssl rand -hex 32)"
    operator = "KubeRay" if options.kuberay else "LeaderWorkerSet"
    yield f"# Needs the operators of {operator}, Prometheus (PodMonitor)"
    yield "# and, where such objects follow, KEDA and the Gateway API Inference Extension."
    yield "#   kubectl apply -f FILE"
    yield f"#   kubectl wait pod {space} --for=condition=Ready --timeout=30m \\"
    yield f"#     -l {','.join(f'{name}={value}' for name, value in labels(deployment).items())}"
    address = f"http://{deployment.name}.{options.namespace}:{deployment.recipe.frontend.port}/v1"
    yield f"# {address} then serves."
    yield f"# A pod that is deleted drains: running requests get {cluster.drain_deadline:g} s."


class _Dumper(yaml.SafeDumper):
    """Writes scripts and files as blocks, and no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)
