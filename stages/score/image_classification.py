"""Soft targets of images: the teacher's distribution over its classes, one an image."""

from collections.abc import Callable

from ..models.attention.longest import Company
from ..models.classification import class_logits
from ..models.identity import Identity
from ..models.image_classification import Images, load_teacher
from ..targets.features.capture import Projections
from ..workers.job import Job
from .classification import class_targets
from .scorer import Batch, Read


class Teacher:
    """A model with a head over classes of images; see `scorer.Teacher`."""

    def __init__(self, job: Job, identity: Identity) -> None:
        self.model = load_teacher(identity, device_map=job.recipe.teacher.device_map)
        self.device, self._job = self.model.device, job
        self.company = Company(self.model)
        self.projections: Projections = {}
        self._images = Images(identity.folder)

    def begin(self, batch: Batch) -> Callable[[], list[Read]]:
        """All images in one pass."""
        inputs = self._images.tensors([request.image for request in batch])
        with self._job.clock.span("model"):
            there = {name: tensor.to(self.device) for name, tensor in inputs.items()}
            logits = class_logits(self.model, there)
        labels = [request.label for request in batch]
        return lambda: [Read(said, {}, {}, {}) for said in class_targets(logits, labels)]
