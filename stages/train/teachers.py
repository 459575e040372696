"""The rows of several teachers that a training needs."""

from collections.abc import Mapping

from ...storage.files.local import LocalFiles
from ...storage.snapshots.snapshot import Snapshot, load_snapshot
from ...storage.store.store import Store
from ..loader.teachers import TeacherSource, open_teachers
from ..recipe.fields import Split
from ..workers.job import Job


def partner_snapshots(
    job: Job, store: Store, read: Mapping[Split, Snapshot]
) -> dict[Split, Snapshot]:
    """The rows beside those of the first teachers, of the splits that are read.

    There are none where there is one teacher.
    """
    return {
        split: load_snapshot(store, name) for split, name in job.partners.items() if split in read
    }


def find_teachers(
    job: Job, store: Store, samples: Snapshot, partners: Snapshot | None, *, files: LocalFiles
) -> TeacherSource | None:
    """Where the targets of each teacher of these samples are; None: the recipe has one teacher."""
    if not job.teachers:
        return None
    job.progress.say("finding what each teacher said of each sample")
    teachers = list(job.teachers.values())
    return open_teachers(store, samples, partners, teachers=teachers, files=files)
