"""Slurm: a run as job scripts in its folder, and what submits them, each after the one before.

Stage one is an array, one worker a task; stage two a job of one process a GPU, started by srun.
torchrun is not in between: it ends with 1 whatever its processes end with, and 75 would be lost.
"""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from shutil import which

from ...stages.recipe.sections import Recipe
from ...storage.errors import StillroomError, UsageError
from ..plan.refusals import refuse_early
from .jobs import FOLDER, Job, Launch, begin, gpus_each, jobs, ranks_asked, workers_asked

SUBMIT = "submit.sh"
NOTICE_SECONDS = 120
"""Before the time limit a job is told; Slurm may tell it a minute earlier."""
SHORTEST_MINUTES = 10
"""Of a time limit: with less, most of a job's time would go into loading its model."""
RESTARTS = 3
"""Of a job whose process was killed; one that was told to stop goes on as often as it is told."""

_TIME = re.compile(r"(\d+-)?\d+(:\d+){0,2}")
_PARTITION = re.compile(r"[\w.,+-]+")
_OPTION = re.compile(r"--?([A-Za-z][\w-]*)")
# What the scripts rest on. Their short forms are -a, -d, -o, -e, -D.
_OURS = frozenset(
    "array a dependency d signal requeue no-requeue open-mode output o error e chdir D wrap "
    "parsable kill-on-invalid-dep nodes N ntasks n ntasks-per-node test-only wait W".split()
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What the command line says of the jobs."""

    workers: int | None = None
    gpus: int | None = None
    """Of each worker."""
    nodes: int = 1
    """Of the training."""
    ranks: int | None = None
    """Processes of the training on each node."""
    partition: str | None = None
    time: str | None = None
    lines: tuple[str, ...] = ()
    """Further options of sbatch, one each, for all jobs."""


def scripts(launch: Launch, asked: Asked) -> dict[str, str]:
    """Name -> text of what is written and submitted; empty where all is done.

    Raises:
        UsageError: several ranks cannot train this student, or nobody says how many workers.
    """
    found = jobs(launch, training=("train",))
    for job in found:
        if job.name == "workers":
            _refuse_workers(launch.recipe, asked)
        elif job.name == "train":
            _refuse_ranks(launch, asked)
    written = {f"{job.name}.sh": _script(launch, job, asked) for job in found}
    return written | {SUBMIT: _submit(launch, found)} if found else {}


def _refuse_workers(recipe: Recipe, asked: Asked) -> None:
    if workers_asked(recipe, asked.workers) is None:
        raise UsageError(
            "launch: how many workers? Nothing here says how many GPUs the cluster can give. Give "
            "--workers N (or compute.workers in the recipe)."
        )
    gpus_each(recipe, asked.gpus)


def _refuse_ranks(launch: Launch, asked: Asked) -> None:
    """What several ranks cannot train: the plan knows of the recipe's own number alone."""
    together = asked.nodes * (ranks_asked(launch.recipe, asked.ranks) or 1)
    if together > 1:
        compute = launch.recipe.compute.model_copy(update={"processes": together})
        several = launch.recipe.model_copy(update={"compute": compute})
        refuse_early(several, launch.plan.bound, write=False)


def submit(launch: Launch, texts: dict[str, str]) -> list[str]:
    """Write the scripts and submit them; what the jobs are called.

    Raises:
        StillroomError: it takes no job, or the folder cannot be written.
    """
    begin(launch.recipe)
    folder = _folder(launch.recipe)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text, "utf-8")
    except OSError as error:
        raise StillroomError(
            f"launch: {folder} cannot be written ({error.strerror}). Name another run.dir."
        ) from error
    done = subprocess.run(["bash", str(folder / SUBMIT)], capture_output=True, text=True)
    if done.returncode:
        taken = f" Taken before that: {', '.join(done.stdout.splitlines())}." if done.stdout else ""
        raise StillroomError(
            f"launch: Slurm did not take a job: {done.stderr.strip()}.{taken} The scripts are in "
            f"{folder}; `bash {folder / SUBMIT}` submits them again."
        )
    return done.stdout.splitlines()


def _folder(recipe: Recipe) -> Path:
    return Path(recipe.run.dir).resolve() / FOLDER


def refuse_slurm(recipe: Recipe, asked: Asked, *, submits: bool) -> None:
    """What can be told before anything is written.

    Args:
        recipe: That is to be launched.
        asked: What the command line says of the jobs.
        submits: Whether the scripts are more than printed.

    Raises:
        UsageError: an option that Slurm would not read, or would read otherwise; there is no Slurm.
    """
    if asked.partition is not None and not _PARTITION.fullmatch(asked.partition):
        raise UsageError(f"--partition: names of partitions, with commas (got {asked.partition!r})")
    if asked.time is not None:
        _refuse_time(asked.time)
    for line in asked.lines:
        option = _OPTION.match(line)
        if option is None or not line.isprintable():
            raise UsageError(
                f"--sbatch: one option of sbatch, such as --account=NAME (got {line!r})"
            )
        if option[1] in _OURS:
            raise UsageError(
                f"--sbatch: {option[0]} is set by the launcher, and its scripts rest on it. Leave "
                "it out; where another value is meant for one job, edit that script and submit it."
            )
    folder = str(_folder(recipe))
    if not folder.isprintable() or "\\" in folder:
        raise UsageError(
            f"run.dir: Slurm cannot name a log in {folder!r}, for it reads the backslash or line "
            "break otherwise. Name another folder."
        )
    if submits and which("sbatch") is None:
        raise UsageError(
            "launch: there is no sbatch here, so this is no machine of a Slurm cluster. Run it on "
            "one; `--dry-run` prints the scripts."
        )


def _refuse_time(time: str) -> None:
    if not _TIME.fullmatch(time):
        raise UsageError(
            f"--time: as Slurm writes it, such as 90, 12:00:00 or 2-00:00:00 (got {time!r})"
        )
    days, _, clock = time.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    # Hours first after days or where there are three, else minutes.
    hours, minutes, _ = (*parts, 0, 0)[:3] if days or len(parts) == 3 else (0, *parts, 0)[:3]
    found = int(days or 0) * 1440 + hours * 60 + minutes
    if found < SHORTEST_MINUTES:
        raise UsageError(
            f"--time: at least {SHORTEST_MINUTES} minutes (got {found}), for a job is told "
            f"{NOTICE_SECONDS} seconds before its end, and up to a minute earlier, and loads its "
            "model first."
        )


def _script(launch: Launch, job: Job, asked: Asked) -> str:
    """A job: what it asks of Slurm, its command, and what becomes of it when that ends."""
    command = shlex.join([sys.executable, "-m", "stillroom", *job.words])
    body = _TRAIN if job.name == "train" else _PLAIN
    lines = [*_options(launch, job, asked), *asked.lines]
    return _SCRIPT.format(
        options="\n".join(f"#SBATCH {line}" for line in lines),
        about=_ABOUT[job.name],
        folder=shlex.quote(str(Path.cwd())),
        body=body.format(command=command),
        restarts=RESTARTS,
    )


def _options(launch: Launch, job: Job, asked: Asked) -> Iterable[str]:
    name = re.sub(r"[^\w.-]", "-", launch.path.stem)
    yield f"--job-name=stillroom-{job.name}-{name}"
    if asked.partition:
        yield f"--partition={asked.partition}"
    if asked.time:
        yield f"--time={asked.time}"
    gpus = 0
    if job.name == "workers":
        workers = workers_asked(launch.recipe, asked.workers) or 1
        yield f"--array=0-{workers - 1}"
        gpus = gpus_each(launch.recipe, asked.gpus)
    elif job.name == "train":
        ranks = ranks_asked(launch.recipe, asked.ranks) or 1
        yield f"--nodes={asked.nodes}"
        yield f"--ntasks-per-node={ranks}"
        gpus = 0 if asked.gpus == 0 else ranks
    if gpus:
        yield f"--gres=gpu:{gpus}"
    yield "--requeue"
    yield "--open-mode=append"
    # B: this script alone is told, and tells its process once. Of a step of srun every process is.
    who = "TERM" if job.name == "train" else "B:USR1"
    yield f"--signal={who}@{NOTICE_SECONDS}"


def _submit(launch: Launch, found: list[Job]) -> str:
    folder = str(_folder(launch.recipe))
    steps = []
    for number, job in enumerate(found):
        log = "%A_%a" if job.name == "workers" else "%j"
        output = shlex.quote(f"{folder.replace('%', '%%')}/{job.name}-{log}.log")
        after = ' --dependency="afterok:${job%%;*}" --kill-on-invalid-dep=yes' if number else ""
        script = shlex.quote(f"{folder}/{job.name}.sh")
        steps.append(f"job=$(sbatch --parsable{after} --output={output} {script})")
        steps.append(f'echo "{job.name}: job ${{job%%;*}}"')
    return "\n".join([_SUBMIT, *steps, ""])


_ABOUT = {
    "prompts": "The prompts, which are read once, before many workers share them.",
    "workers": "Stage one: each task of the array is one worker, with the GPUs that it is given.",
    "train": "Stage two: one process a GPU trains the student; then it is judged.",
}

_SUBMIT = """#!/bin/bash
# Submits the jobs of a run, each to begin when the one before has ended well. Edit them as \
you like.
set -euo pipefail"""

_SCRIPT = """#!/bin/bash
{options}
# {about}
cd -- {folder} || exit 1
# Tasks of an array are known by these two: the job's own number differs from start to start.
id=${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID}}
id=${{id:-$SLURM_JOB_ID}}
echo "job $id on $(hostname), started again ${{SLURM_RESTART_COUNT:-0}} times"
told='' ended=''

{body}
# `wait` ends when a signal comes, too; what the process ended with is remembered.
while wait "$child"; kill -0 "$child" 2>/dev/null; do :; done
wait "$child"
code=$?
trap '' TERM USR1

again=''
(( code == 75 )) && again='stopped by a notice'
[[ $told ]] && (( code != 0 )) && again='its time was up'
(( code > 128 && code != 130 && ${{SLURM_RESTART_COUNT:-0}} < {restarts} )) && again='killed'
if [[ $again && ! $ended ]]; then
    echo "job $id: $again (exit code $code), back into the queue"
    scontrol requeue "$id"
    exit 75
fi
exit "$code"
"""

_PLAIN = """# The time is nearly up: finished rows are committed.
trap 'told=1; kill -TERM "$child"' USR1
# Slurm ends this job, and tells its processes too. To one that was told, HUP is no second time.
trap 'ended=1; kill -HUP "$child"' TERM
{command} &
child=$!
"""

_TRAIN = """# Slurm ends this job, and tells the processes of srun itself.
trap 'ended=1' TERM
srun {command} &
child=$!
"""
