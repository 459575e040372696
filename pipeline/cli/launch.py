"""The command `launch`: a run on a cluster, by Ray or Slurm."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...storage.errors import UsageError
from ..printing.text import show_text
from .app import (
    AllowCode,
    AsJson,
    Overrides,
    Quiet,
    RecipePath,
    print_for_people,
    print_json,
)

if TYPE_CHECKING:
    from ...stages.recipe.sections import Recipe
    from ..launch.jobs import Launch
    from ..launch.slurm import Asked

WHERE = ("ray", "slurm")


def launch(
    recipe: RecipePath,
    on: Annotated[str, typer.Option("--on", metavar="ray|slurm", help="What hands out machines.")],
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Workers of stage one [Ray: one for each GPU of the cluster]."),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(min=0, help="GPUs of each worker; 0: all is done on CPUs [as engines need]."),
    ] = None,
    ranks: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes that train, one GPU each, on each node [Slurm: 1; Ray: a node's].",
        ),
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Slurm: nodes that train together [1].")
    ] = None,
    partition: Annotated[str | None, typer.Option(help="Slurm: as sbatch takes it.")] = None,
    time: Annotated[
        str | None, typer.Option(help="Slurm: limit of each job, as sbatch takes it.")
    ] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(help="Slurm: an option of sbatch for all jobs, --account=NAME. Repeatable."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be started; write nothing.")
    ] = False,
    overrides: Overrides = None,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Start a run on a cluster: the prompts, then workers that share stage one, then the training.

    Ray: on the cluster that RAY_ADDRESS names, or on this machine; it shows how far the run is
    until it ends. Slurm: writes the scripts to run.dir/launch and submits them.
    """
    from ..launch.jobs import jobs, opened, unused
    from ..launch.ray_cluster import refuse_ray
    from ..launch.slurm import Asked, refuse_slurm

    if on not in WHERE:
        raise UsageError(f"--on: ray or slurm (got {on!r}).")
    asked = Asked(
        workers=workers,
        gpus=gpus,
        nodes=nodes or 1,
        ranks=ranks,
        partition=partition,
        time=time,
        lines=tuple(sbatch or ()),
    )
    if on == "ray":
        given = {"--nodes": nodes, "--partition": partition, "--time": time, "--sbatch": sbatch}
        for name, value in given.items():
            if value:
                raise UsageError(f"{name}: Ray has no such thing. Leave it out, or use --on slurm.")

    def refuse(read: "Recipe") -> None:
        if on == "ray":
            refuse_ray(connects=not dry_run)
        else:
            refuse_slurm(read, asked, submits=not dry_run)

    opening = opened(
        recipe, overrides or [], allow_code=allow_code, refuse=refuse, write=not dry_run
    )
    found: dict[str, Any] = {"run_dir": opening.recipe.run.dir, "jobs": []}
    todo = jobs(opening, training=())
    options = {"--workers": workers, "--gpus": gpus, "--ranks": ranks, "--nodes": nodes}
    for said in unused(todo, options) if todo else ():
        print_for_people(said)
    if not todo:
        print_for_people("nothing to do: every stage is done")
    elif on == "ray":
        found |= _on_ray(opening, asked, dry_run=dry_run, quiet=quiet)
    else:
        found |= _on_slurm(opening, asked, dry_run=dry_run)
    print_json(found, as_json)


def _on_slurm(opening: "Launch", asked: "Asked", *, dry_run: bool) -> dict[str, Any]:
    from ..launch.slurm import scripts, submit

    texts = scripts(opening, asked)
    if dry_run:
        for name, text in texts.items():
            show_text(f"# ---- {name}\n{text}\n")
        return {"scripts": texts}
    submitted = []
    for line in submit(opening, texts):
        print_for_people(line)
        name, _, number = line.partition(": job ")
        submitted.append({"name": name, "job": number})
    return {"jobs": submitted}


def _on_ray(opening: "Launch", asked: "Asked", *, dry_run: bool, quiet: bool) -> dict[str, Any]:
    from ..launch.ray_cluster import described, launch_on_ray

    if dry_run:
        for line in described(opening, asked):
            print_for_people(line)
        return {}
    found: dict[str, Any] = launch_on_ray(opening, asked, quiet=quiet)
    return found
