"""``launch slurm``: an sbatch script for a recipe. Exit status: 0 printed, 2 a bad recipe or
options that do not fit it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..recipe.file import from_here, load_recipe
from ..recipe.recipe import RecipeError, model_directory
from ..slurm.job import Wishes, make_job
from ..slurm.script import script

_Text = str | None

slurm_app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@slurm_app.command()
def slurm(
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="A recipe file, or the name of a packaged recipe.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Override keys of the recipe.")
    ] = None,
    nodes: Annotated[
        int | None,
        typer.Option(min=1, help="Checked against the recipe's cluster.nodes, which it takes from there."),
    ] = None,
    spare: Annotated[
        int, typer.Option(min=0, help="Nodes beyond those of the recipe, for ranks whose node is lost.")
    ] = 0,
    partition: Annotated[
        _Text, typer.Option("--partition", "-p", help="As sbatch has it, like the next ones.")
    ] = None,
    account: Annotated[_Text, typer.Option("--account", "-A")] = None,
    qos: Annotated[_Text, typer.Option()] = None,
    time: Annotated[_Text, typer.Option("--time", "-t", help="Time limit; the job drains before it.")] = None,
    gres: Annotated[
        _Text, typer.Option(help="For example gpu:h100:8; left out, --gpus-per-node as the recipe needs.")
    ] = None,
    cpus: Annotated[
        int | None,
        typer.Option(min=1, help="Cores of each node, which is then shared; left out, whole nodes."),
    ] = None,
    mem: Annotated[
        _Text, typer.Option(help="Memory of each node, 64G; left out, all of whole nodes.")
    ] = None,
    constraint: Annotated[_Text, typer.Option("--constraint", "-C")] = None,
    nodelist: Annotated[_Text, typer.Option("--nodelist", "-w")] = None,
    exclude: Annotated[_Text, typer.Option("--exclude", "-x")] = None,
    reservation: Annotated[_Text, typer.Option()] = None,
    name: Annotated[_Text, typer.Option(help="Of the job; left out, lockstep-RECIPE.")] = None,
    folder: Annotated[
        _Text,
        typer.Option(help="For the job's own folder of logs, on a shared file system; left out, sbatch's."),
    ] = None,
    scratch: Annotated[
        str, typer.Option(help="Folder on every node's own disk for Ray's sockets; a short path.")
    ] = "/tmp",
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Of the server; left out, a free one of the job's own."),
    ] = None,
    interface: Annotated[
        _Text, typer.Option(help="Network interface of Ray and the server; left out, Slurm's address.")
    ] = None,
    bin_folder: Annotated[
        _Text, typer.Option("--bin", help="Folder of launch and ray on every node; left out, this command's.")
    ] = None,
    requeue: Annotated[bool, typer.Option(help="Start again after a lost node or preemption.")] = False,
    check: Annotated[bool, typer.Option(help="Run launch check on the nodes first.")] = True,
    sbatch: Annotated[
        list[str] | None, typer.Option(metavar="OPTION", help="Another option of sbatch; may be repeated.")
    ] = None,
    container_image: Annotated[
        _Text, typer.Option(help="Image that holds launch, for the pyxis plugin.")
    ] = None,
    container_mount: Annotated[
        list[str] | None, typer.Option(metavar="FROM:TO", help="More folders for it; may be repeated.")
    ] = None,
) -> None:
    """Prints an sbatch script that serves a recipe on a Slurm cluster: launch slurm --recipe R >
    job.sh && sbatch job.sh
    """
    try:
        parsed, path = load_recipe(recipe, overrides or ())
        wishes = Wishes(
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
        given = [from_here(override) for override in overrides or ()]
        job = make_job(
            parsed, path, model_directory(parsed, path.parent), given, wishes, Path(sys.executable).parent
        )
    except RecipeError as error:
        Console(file=sys.stderr, highlight=False, soft_wrap=True).print(f"error: {error}", markup=False)
        raise typer.Exit(2) from None
    print(script(job), end="")
