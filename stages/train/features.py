"""The teacher's features that a training needs, and what of the student is to match them."""

from typing import TYPE_CHECKING, Any

from ...storage.files.local import LocalFiles
from ...storage.snapshots.snapshot import Snapshot, load_snapshot
from ...storage.store.store import Store
from ..loader.features import FeatureSource, open_features
from ..loader.samples import Lengths
from ..recipe.features import learnt
from ..recipe.sections import Loss, Train
from ..workers.job import Job

if TYPE_CHECKING:
    from ..losses.features.matching import Matching


def find_features(
    job: Job, loss: Loss, store: Store, samples: Snapshot, *, files: LocalFiles
) -> FeatureSource | None:
    """Where the teacher's features of these samples are; None where the loss needs none.

    Raises:
        UsageError: a sample has none.
    """
    if not loss.features:
        return None
    job.progress.say("finding the features of each sample")
    wanted = learnt(loss.features, job.score.features)
    features = load_snapshot(store, job.features_id)
    return open_features(store, samples, features, wanted=wanted, files=files)


def make_matching(
    model: Any, job: Job, loss: Loss, source: FeatureSource | None, *, longest: int
) -> "Matching | None":
    """What is matched, with its maps on the student's device; None where nothing is.

    `longest`: tokens of the longest sample that is read.

    Raises:
        UsageError: the student does not show what is compared.
    """
    if source is None:
        return None
    from ..losses.features.matching import Matching, pairs_of, parts_of
    from ..targets.features.blocks import blocks_of
    from ..targets.features.capture import check_first_token
    from ..targets.features.shown import check_shown, glimpse

    pairs = pairs_of(loss.features, job.score.features, student_blocks=len(blocks_of(model)))
    known = {
        "layouts": source.layouts(),
        "student_width": model.config.get_text_config().hidden_size,
        "seed": job.recipe.run.seed,
    }
    matching = Matching([part for pair in pairs for part in parts_of(pair, **known)])
    check_shown(model, matching.needs)
    firsts = [p.student for p in pairs if "pooled_cls" in p.loss.needs]
    check_first_token(model, sorted(set(firsts)))
    matching.check(glimpse(model, matching.needs), longest)
    return matching.to(next(model.parameters()).device)


def group_notes(group: int | None, lengths: Lengths, train: Train) -> list[str]:
    """What the user is told of losses between samples, for samples of these lengths."""
    if group is None:
        return []
    mean = lengths.tokens / lengths.samples
    if 2 * mean > train.tokens_per_step:
        return [
            f"loss.features: samples have {mean:,.0f} tokens in the mean and train.tokens_per_step is "
            f"{train.tokens_per_step:,}: a step that holds one sample has no terms between samples. "
            "Raise it"
        ]
    held = min(group * mean, train.tokens_per_step)
    if held <= train.tokens_per_pass:
        return []
    return [
        f"loss.features: a group of {group} samples has about {held:,.0f} tokens, which is more than "
        f"train.tokens_per_pass ({train.tokens_per_pass:,}), and is read in one pass all the same"
    ]
