"""Stage `train`: a student learns from a snapshot, and ends up in its folder.

A run that was stopped or killed goes on from its last checkpoint and sees what an undisturbed run
would have seen. In the run's folder: `checkpoints/` (the last and the best), `tensorboard/`,
`student/`, and last `train.json`, whose existence means done.
"""

from ...storage.files.local import LocalFiles
from ..recipe.fields import Arm
from ..recipe.run_folder import TRAINED, read_record
from ..recipe.sections import Loss, Recipe
from ..workers.job import Job, StageResult
from .run import Run

CURVES = ("history", "validation", "speed")
"""Lists of `train.json`, which are not repeated in what a stage says."""


def run(job: Job) -> StageResult:
    """Train the student of one arm, or say what was done if it is done.

    Raises:
        UsageError: student, snapshot and settings do not fit together.
        Stopped: a signal came; a checkpoint was written.
    """
    files = LocalFiles(job.train_dirs[job.arm])
    samples, tokens = 0, 0
    # What the first one sees: on another machine a file that has just come may be seen later.
    if not job.ranks.told(files.exists(TRAINED)):
        samples, tokens = Run(job, files, arm_loss(job.recipe, job.arm)).train()
    summary = job.ranks.by_first(lambda: read_record(files.path(TRAINED)))
    details = {name: value for name, value in summary.items() if name not in CURVES}
    return StageResult(rows=samples, tokens=tokens, details=details)


def arm_loss(recipe: Recipe, arm: Arm) -> Loss:
    """The recipe's loss; for the baseline, and where nothing was scored, cross-entropy alone."""
    if arm == "baseline" or recipe.score is None:
        alone = {"soft_weight": 0.0, "hard_weight": 1.0, "features": []}
        return recipe.loss.model_copy(update=alone)
    return recipe.loss
