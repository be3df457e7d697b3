"""``launch k8s``: prints manifests for a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .app import app
from .options import Overrides, RecipeName, refusal

if TYPE_CHECKING:
    from ..kubernetes.deployment import DeploymentOptions

_Text = str | None
_Image = typer.Option(help="Container image with launch.")
_Name = typer.Option(help="Name of the objects. Default: lockstep-RECIPE.")
_Namespace = typer.Option("--namespace", "-n", help="Namespace of the objects.")
_Replicas = typer.Option(min=1, help="Clusters, each with cluster.nodes pods.")
_Most = typer.Option(min=1, help="KEDA adds clusters up to this number. Default: no ScaledObject.")
_Spare = typer.Option(min=0, help="Extra pods of each cluster, to replace lost nodes.")
_Cpus = typer.Option(help="CPUs of each pod. Default: one per rank, controller and frontend.")
_Memory = typer.Option(help="Memory of each pod, such as 512Gi. Default: no request.")
_Shm = typer.Option(help="Size of /dev/shm. Default: 16Gi with GPUs, else 2Gi.")
_Gpu = typer.Option(help="Resource of GPUs, of which each rank gets one.")
_Rdma = typer.Option(metavar="RESOURCE=COUNT", help="RDMA devices, such as rdma/ib=8; may be repeated.")
_Claim = typer.Option(
    metavar="CLAIM[/FOLDER]", help="PersistentVolumeClaim with the model. Default: model.path on the nodes."
)
_Kernels = typer.Option(
    metavar="CLAIM[/FOLDER]",
    help="PersistentVolumeClaim for compiled kernels, ReadWriteMany where there are several pods. "
    "Default: they live as long as the pod.",
)
_Selector = typer.Option(metavar="LABEL=VALUE", help="Nodes that may be used; may be repeated.")
_Prometheus = typer.Option(help="Prometheus that KEDA asks.")
_Picker = typer.Option(help="Service of an endpoint picker; prints an InferencePool for it.")
_Kuberay = typer.Option("--kuberay", help="A RayCluster of KubeRay in place of the LeaderWorkerSet.")


@app.command("k8s")
def kubernetes(
    context: typer.Context,
    recipe: RecipeName,
    overrides: Overrides = None,
    image: Annotated[str, _Image] = "lockstep",
    name: Annotated[_Text, _Name] = None,
    namespace: Annotated[str, _Namespace] = "default",
    replicas: Annotated[int, _Replicas] = 1,
    max_replicas: Annotated[int | None, _Most] = None,
    spare: Annotated[int, _Spare] = 0,
    cpus: Annotated[_Text, _Cpus] = None,
    memory: Annotated[_Text, _Memory] = None,
    shm: Annotated[_Text, _Shm] = None,
    gpu_resource: Annotated[str, _Gpu] = "nvidia.com/gpu",
    rdma: Annotated[list[str] | None, _Rdma] = None,
    model_claim: Annotated[_Text, _Claim] = None,
    kernel_claim: Annotated[_Text, _Kernels] = None,
    node_selector: Annotated[list[str] | None, _Selector] = None,
    prometheus: Annotated[str, _Prometheus] = "http://prometheus-operated.monitoring.svc:9090",
    endpoint_picker: Annotated[_Text, _Picker] = None,
    kuberay: Annotated[bool, _Kuberay] = False,
) -> None:
    """Print Kubernetes manifests that serve a recipe.

    launch k8s --recipe R --image registry/lockstep:1 > lockstep.yaml

    Exit status: 0 printed, 2 bad recipe or options that contradict it.
    """
    from ..kubernetes.deployment import make_deployment
    from ..kubernetes.manifest import manifest
    from ..recipe.file import load_recipe
    from ..recipe.recipe import RecipeError

    try:
        parsed, path = load_recipe(recipe, overrides or ())
        deployment = make_deployment(parsed, path, overrides or (), _options(context.params))
    except RecipeError as error:
        raise refusal(error) from None
    print(manifest(deployment), end="")


def _options(parameters: Mapping[str, Any]) -> DeploymentOptions:
    """The options given, by the names of the command's parameters."""
    from ..kubernetes.deployment import DeploymentOptions

    given = {name: parameters[name] for name in DeploymentOptions.__dataclass_fields__}
    several = {name: tuple(given[name] or ()) for name in ("rdma", "node_selector")}
    return DeploymentOptions(**given | several)
