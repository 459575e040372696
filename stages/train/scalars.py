"""Scalars of a training run, over positions fed.

They are on TensorBoard, and where it was asked for on W&B.
"""

import uuid
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ...storage.errors import UsageError
from ...storage.files.local import LocalFiles
from ..recipe.load import recorded
from ..workers.job import Job

if TYPE_CHECKING:
    from .together.means import Losses, StepResult


ID_FILE = "wandb-id"


class Board:
    """The board of TensorBoard scalars over tokens.

    What a run wrote after the checkpoint it goes on from is purged.
    """

    def __init__(self, job: Job, files: LocalFiles, tokens: int) -> None:
        """Begin after so many `tokens`; of several ranks the first one writes."""
        from torch.utils.tensorboard import SummaryWriter

        self._beside = self._writer = None
        if job.ranks.first:
            self._beside = open_wandb(job, files)
            self._writer = SummaryWriter(files.path("tensorboard"), purge_step=tokens + 1)

    def __enter__(self) -> "Board":
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._beside is not None:
            self._beside.close()

    def write(self, tokens: int, scalars: dict[str, float]) -> None:
        """Name -> value, as of this many positions fed."""
        if self._writer is None:
            return
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, global_step=tokens)
        if self._beside is not None:
            self._beside.write(tokens, scalars)


def step_scalars(result: "StepResult") -> dict[str, float]:
    """What is shown of a step."""
    rates = {"learning_rate": result.learning_rate, "grad_norm": result.grad_norm}
    return loss_scalars("loss", result.losses) | rates | result.scheduled


def loss_scalars(prefix: str, losses: "Losses") -> dict[str, float]:
    """Losses that were computed, as `<prefix>/total`, `soft`, `hard`, and one a pair of layers."""
    values = {"total": losses.loss, "soft": losses.soft, "hard": losses.hard, **losses.features}
    return {f"{prefix}/{name}": value for name, value in values.items() if value is not None}


def refuse_without_wandb(project: str | None) -> None:
    """Before any work.

    Raises:
        UsageError: a project is named, and the package is not there.
    """
    if project is not None and find_spec("wandb") is None:
        raise UsageError(
            f"train.wandb: {project!r} asks for Weights & Biases, which is not installed here. "
            "pip install wandb, or set train.wandb to null (TensorBoard's files are always "
            "written)."
        )


def open_wandb(job: Job, files: LocalFiles) -> "WandbBoard | None":
    """The run of this student in the recipe's project; None where none is named.

    Args:
        job: Its recipe goes into the run's config.
        files: The student's folder. The run's id is kept there, so a training that goes on goes on
            in the same run.

    Raises:
        UsageError: wandb is not installed, or does not start (no key, no network).
    """
    project = job.train.wandb
    if project is None:
        return None
    refuse_without_wandb(project)
    with job.clock.span("start"):
        return WandbBoard(job, files, project)


class WandbBoard:
    """One run of W&B. What is logged is a function of tokens fed, as on TensorBoard.

    A training that goes on from a checkpoint repeats its last steps with the same numbers: what is
    there already is not logged again. If wandb fails later on, that is said once, and the training
    goes on without it.
    """

    def __init__(self, job: Job, files: LocalFiles, project: str) -> None:
        import wandb

        files.put_if_absent(ID_FILE, uuid.uuid4().hex[:16].encode())
        folder = job.train_dirs[job.arm]
        self._say = job.progress.say
        try:
            self._run: Any = wandb.init(
                project=project,
                id=files.read(ID_FILE).decode(),
                name=f"{folder.parent.name}/{folder.name}",
                resume="allow",
                dir=str(folder),
                config={"arm": job.arm, "recipe": recorded(job.recipe)},
                settings=wandb.Settings(
                    console="off"
                ),  # the stage's log is complete without its help
            )
            self._run.define_metric("*", step_metric="tokens")
        except Exception as error:
            raise UsageError(
                f"train.wandb: wandb does not start ({type(error).__name__}: {error}). `wandb "
                "login` gives it a key, WANDB_MODE=offline keeps the run in the student's folder "
                "(`wandb sync` sends it later), and train.wandb=null leaves it out."
            ) from error
        self._logged = int(self._run.summary.get("tokens", 0))

    def write(self, tokens: int, scalars: dict[str, float]) -> None:
        """Name -> value, as of this many positions fed."""
        if self._run is None or tokens < self._logged:
            return
        try:
            self._run.log({"tokens": tokens, **scalars})
        except Exception as error:
            self._lost(error)

    def close(self) -> None:
        """Send what waits."""
        if self._run is None:
            return
        try:
            self._run.finish()
        except Exception as error:
            self._lost(error)

    def _lost(self, error: Exception) -> None:
        self._say(f"wandb: {type(error).__name__}: {error}: nothing more is sent to it")
        self._run = None
