"""Models of the task image_classification: a head over classes, one image a row, logits [B, C].

What a processor does is cut in two. Size and crop come first, once: what they leave is stored, 8
bits a channel, as a PNG file. Scaling and normalising follow each time that a model reads it. Both
are the processor's own, in the backend of Pillow: the same pixels with torchvision and without.

Letters: B images, c channels, H and W their size, C classes.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel

from ...storage.errors import IntegrityError, UsageError, answered
from .classification import trained
from .fit.classes import names_in
from .fit.processor import channels_of, processor_config
from .identity import Identity
from .loading import ModelKind

_SIDES = ((48, 32), (32, 48))
"""Of images that differ in shape: what becomes of them must not."""
_AS_IT_IS = {"do_resize": False, "do_center_crop": False, "do_pad": False}
_NUMBERS_ALONE = {"do_rescale": False, "do_normalize": False}


class Images:
    """How images become the inputs of models.

    The teacher's processor says so, for its students too.
    """

    def __init__(self, folder: Path) -> None:
        """`folder`: holds the teacher's config and its processor's.

        Raises:
            UsageError: the processor does not load, or cannot be cut in two.
        """
        processor_config(folder)  # says what is wrong with it
        self._channels, self._folder = channels_of(folder), folder
        with answered(f"{folder}: the image processor does not load", "Save it again."):
            self._processor: Any = AutoImageProcessor.from_pretrained(
                folder, backend="pil", trust_remote_code=False
            )
        what = f"{folder}: its image processor ({type(self._processor).__name__}) reads no image"
        with answered(what, "Use a model with a processor of images alone."):
            shapes = [self._checked(side) for side in _SIDES]
        if shapes[0] != shapes[1]:
            raise UsageError(
                f"{folder}: its image processor leaves images of {_SIDES[0]} and {_SIDES[1]} with "
                f"the shapes {shapes[0]} and {shapes[1]}, and images that differ cannot share a "
                "pass. Give it one size, or do_center_crop with a crop_size."
            )
        self.shape: tuple[int, ...] = shapes[0]
        """(c, H, W)"""

    def read(self, image: Image.Image) -> bytes:
        """An image as a model reads it: resized and cropped, as a PNG file."""
        pixels = self._sized(image)
        shown = pixels[0] if self._channels == 1 else np.moveaxis(pixels, 0, -1)
        file = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(shown)).save(file, "PNG", compress_level=3)
        return file.getvalue()

    def tensors(self, images: Sequence[bytes | None]) -> dict[str, Tensor]:
        """`pixel_values` [B, c, H, W] float32 of what `read` made.

        Raises:
            IntegrityError: a row has no image, or one of another shape.
        """
        found = [self._numbers(_pixels(image, self.shape)) for image in images]
        return {"pixel_values": torch.from_numpy(np.stack(found))}

    def _checked(self, sides: tuple[int, int]) -> tuple[int, ...]:
        """The shape that is left of an image.

        A processor whose two parts are not the whole is refused.
        """
        mode = "L" if self._channels == 1 else "RGB"
        random = np.random.default_rng(0).integers(0, 256, (*sides, 3), dtype=np.uint8)
        image = Image.fromarray(random).convert(mode)
        pixels = self._sized(image)
        (whole,) = self._processor(images=[image], return_tensors="np")["pixel_values"]
        if not np.array_equal(self._numbers(pixels), whole):
            raise UsageError(
                f"{self._folder}: its image processor ({type(self._processor).__name__}) does more "
                "than resize, crop, scale and normalise. Use a model with a processor that does no "
                "more."
            )
        return pixels.shape

    def _sized(self, image: Image.Image) -> np.ndarray:
        """[c, H, W] uint8, resized and cropped."""
        made = self._processor(images=[image], **_NUMBERS_ALONE, return_tensors="np")
        (pixels,) = made["pixel_values"]
        sized: np.ndarray = pixels
        if sized.dtype != np.uint8:
            raise UsageError(
                f"{self._folder}: its image processor leaves {sized.dtype}, not bytes."
            )
        return sized

    def _numbers(self, pixels: np.ndarray) -> np.ndarray:
        """[c, H, W] float32, scaled and normalised."""
        made = self._processor(
            images=[pixels], **_AS_IT_IS, input_data_format="channels_first", return_tensors="np"
        )
        (numbers,) = made["pixel_values"]
        return np.asarray(numbers, np.float32)


def _pixels(image: bytes | None, shape: tuple[int, ...]) -> np.ndarray:
    """[c, H, W] uint8 of a stored image."""
    if image is None:
        raise IntegrityError("a row of images has none. Run `stillroom verify`.")
    pixels = np.asarray(Image.open(io.BytesIO(image), formats=("PNG",)))
    found = pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)
    if found.shape != shape or found.dtype != np.uint8:
        raise IntegrityError(
            f"a stored image is {found.shape} {found.dtype}, the processor makes {shape} uint8. "
            "Run `stillroom verify`."
        )
    return np.ascontiguousarray(found)


def student_kind(teacher_dir: Path) -> ModelKind:
    """A student has its teacher's classes, and reads its images."""
    return of_classes(names_in(teacher_dir), Images(teacher_dir).shape)


def of_classes(names: Sequence[str], shape: Sequence[int] = ()) -> ModelKind:
    """Models with a head over these classes, of images of this shape."""
    example = {"pixel_values": torch.zeros(1, *shape)} if shape else {}
    auto = AutoModelForImageClassification
    return ModelKind(auto=auto, adapter="", classes=names, example=example)


def load_teacher(identity: Identity, *, device_map: str | None = None) -> PreTrainedModel:
    """A model with a trained head, in evaluation mode, on the GPU if there is one.

    Raises:
        UsageError: the folder does not hold one.
    """
    return trained(of_classes(()), identity, device_map=device_map)
