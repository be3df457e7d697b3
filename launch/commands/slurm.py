"""``launch slurm``: prints an sbatch script for a recipe."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .app import app
from .options import Overrides, RecipeName, refusal

_Text = str | None


@app.command()
def slurm(
    recipe: RecipeName,
    overrides: Overrides = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Must equal cluster.nodes, from which nodes are counted.")
    ] = None,
    spare: Annotated[int, typer.Option(min=0, help="Extra nodes, to replace lost ones.")] = 0,
    partition: Annotated[
        _Text, typer.Option("--partition", "-p", help="Passed to sbatch, as are those without a description.")
    ] = None,
    account: Annotated[_Text, typer.Option("--account", "-A")] = None,
    qos: Annotated[_Text, typer.Option()] = None,
    time: Annotated[
        _Text, typer.Option("--time", "-t", help="Time limit. The job drains before it ends.")
    ] = None,
    gres: Annotated[
        _Text, typer.Option(help="For example gpu:h100:8. Default: --gpus-per-node with the recipe's GPUs.")
    ] = None,
    cpus: Annotated[
        int | None, typer.Option(min=1, help="Cores per node; nodes may be shared. Default: whole nodes.")
    ] = None,
    mem: Annotated[
        _Text, typer.Option(help="Memory per node, such as 64G. Default: all memory of whole nodes.")
    ] = None,
    constraint: Annotated[_Text, typer.Option("--constraint", "-C")] = None,
    nodelist: Annotated[_Text, typer.Option("--nodelist", "-w")] = None,
    exclude: Annotated[_Text, typer.Option("--exclude", "-x")] = None,
    reservation: Annotated[_Text, typer.Option()] = None,
    name: Annotated[_Text, typer.Option(help="Job name. Default: lockstep-RECIPE.")] = None,
    folder: Annotated[
        _Text,
        typer.Option(help="Parent of the log folder, on a shared file system. Default: sbatch's folder."),
    ] = None,
    scratch: Annotated[
        str, typer.Option(help="Folder for Ray's sockets on every node's own disk. Keep the path short.")
    ] = "/tmp",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Server port. Default: a free one.")
    ] = None,
    interface: Annotated[
        _Text, typer.Option(help="Network interface of Ray and the server. Default: that of Slurm's address.")
    ] = None,
    bin_folder: Annotated[
        _Text, typer.Option("--bin", help="Folder of launch and ray on every node. Default: this command's.")
    ] = None,
    requeue: Annotated[bool, typer.Option(help="Restart after a lost node or preemption.")] = False,
    check: Annotated[bool, typer.Option(help="Run launch check on the nodes first.")] = True,
    sbatch: Annotated[
        list[str] | None, typer.Option(metavar="OPTION", help="Another sbatch option; may be repeated.")
    ] = None,
    container_image: Annotated[
        _Text, typer.Option(help="Container image with launch, for the pyxis plugin.")
    ] = None,
    container_mount: Annotated[
        list[str] | None, typer.Option(metavar="FROM:TO", help="Another container mount; may be repeated.")
    ] = None,
) -> None:
    """Print an sbatch script that serves a recipe on a Slurm cluster.

    launch slurm --recipe R > job.sh && sbatch job.sh

    Exit status: 0 printed, 2 bad recipe or options that contradict it.
    """
    from ..recipe.file import from_here, load_recipe
    from ..recipe.recipe import RecipeError, model_directory
    from ..slurm.job import JobOptions, make_job
    from ..slurm.script import script

    options = JobOptions(
        nodes=nodes,
        spare=spare,
        partition=partition,
        account=account,
        qos=qos,
        time=time,
        gres=gres,
        cpus=cpus,
        mem=mem,
        constraint=constraint,
        nodelist=nodelist,
        exclude=exclude,
        reservation=reservation,
        name=name,
        folder=folder,
        scratch=scratch,
        port=port,
        interface=interface,
        bin=bin_folder,
        requeue=requeue,
        check=check,
        sbatch=tuple(sbatch or ()),
        container_image=container_image,
        container_mounts=tuple(container_mount or ()),
    )
    try:
        parsed, path = load_recipe(recipe, overrides or ())
        given = [from_here(override) for override in overrides or ()]
        model = model_directory(parsed, path.parent)
        job = make_job(parsed, path, model, given, options, Path(sys.executable).parent)
    except RecipeError as error:
        raise refusal(error) from None
    print(script(job), end="")
