"""``launch slurm``: prints an sbatch script for a recipe."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .app import app
from .options import Overrides, RecipeName, refusal

if TYPE_CHECKING:
    from ..slurm.job import JobOptions

_Text = str | None
_Nodes = typer.Option(min=1, help="Must equal cluster.nodes, from which nodes are counted.")
_Spare = typer.Option(min=0, help="Extra nodes, to replace lost ones.")
_Partition = typer.Option("--partition", "-p", help="Passed to sbatch, as are those without a description.")
_Time = typer.Option("--time", "-t", help="Time limit. The job drains before it ends.")
_Gres = typer.Option(help="For example gpu:h100:8. Default: --gpus-per-node with the recipe's GPUs.")
_Cpus = typer.Option(min=1, help="Cores per node; nodes may be shared. Default: whole nodes.")
_Mem = typer.Option(help="Memory per node, such as 64G. Default: all memory of whole nodes.")
_Name = typer.Option(help="Job name. Default: lockstep-RECIPE.")
_Folder = typer.Option(help="Parent of the log folder, on a shared file system. Default: sbatch's folder.")
_Scratch = typer.Option(help="Folder for Ray's sockets on every node's own disk. Keep the path short.")
_Port = typer.Option(min=1, max=65535, help="Server port. Default: a free one.")
_Interface = typer.Option(help="Network interface of Ray and the server. Default: that of Slurm's address.")
_Bin = typer.Option("--bin", help="Folder of launch and ray on every node. Default: this command's.")
_Requeue = typer.Option(help="Restart after a lost node or preemption.")
_Check = typer.Option(help="Run launch check on the nodes first.")
_Sbatch = typer.Option(metavar="OPTION", help="Another sbatch option; may be repeated.")
_Image = typer.Option(help="Container image with launch, for the pyxis plugin.")
_Mounts = typer.Option(
    "--container-mount", metavar="FROM:TO", help="Another container mount; may be repeated."
)


@app.command()
def slurm(
    context: typer.Context,
    recipe: RecipeName,
    overrides: Overrides = None,
    nodes: Annotated[int | None, _Nodes] = None,
    spare: Annotated[int, _Spare] = 0,
    partition: Annotated[_Text, _Partition] = None,
    account: Annotated[_Text, typer.Option("--account", "-A")] = None,
    qos: Annotated[_Text, typer.Option()] = None,
    time: Annotated[_Text, _Time] = None,
    gres: Annotated[_Text, _Gres] = None,
    cpus: Annotated[int | None, _Cpus] = None,
    mem: Annotated[_Text, _Mem] = None,
    constraint: Annotated[_Text, typer.Option("--constraint", "-C")] = None,
    nodelist: Annotated[_Text, typer.Option("--nodelist", "-w")] = None,
    exclude: Annotated[_Text, typer.Option("--exclude", "-x")] = None,
    reservation: Annotated[_Text, typer.Option()] = None,
    name: Annotated[_Text, _Name] = None,
    folder: Annotated[_Text, _Folder] = None,
    scratch: Annotated[str, _Scratch] = "/tmp",
    port: Annotated[int | None, _Port] = None,
    interface: Annotated[_Text, _Interface] = None,
    bin_folder: Annotated[_Text, _Bin] = None,
    requeue: Annotated[bool, _Requeue] = False,
    check: Annotated[bool, _Check] = True,
    sbatch: Annotated[list[str] | None, _Sbatch] = None,
    container_image: Annotated[_Text, _Image] = None,
    container_mounts: Annotated[list[str] | None, _Mounts] = None,
) -> None:
    """Print an sbatch script that serves a recipe on a Slurm cluster.

    launch slurm --recipe R > job.sh && sbatch job.sh

    Exit status: 0 printed, 2 bad recipe or options that contradict it.
    """
    from ..recipe.file import from_here, load_recipe
    from ..recipe.model_folder import model_directory
    from ..recipe.recipe import RecipeError
    from ..slurm.job import make_job
    from ..slurm.script import script

    try:
        parsed, path = load_recipe(recipe, overrides or ())
        given = [from_here(override) for override in overrides or ()]
        model = model_directory(parsed, path.parent)
        options = _options(context.params)
        job = make_job(parsed, path, model, given, options, Path(sys.executable).parent)
    except RecipeError as error:
        raise refusal(error) from None
    print(script(job), end="")


def _options(parameters: Mapping[str, Any]) -> JobOptions:
    """The options given, by the names of the command's parameters."""
    from ..slurm.job import JobOptions

    given = {name: parameters[name] for name in JobOptions.__dataclass_fields__}
    several = {name: tuple(given[name] or ()) for name in ("sbatch", "container_mounts")}
    return JobOptions(**given | several)
