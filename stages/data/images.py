"""Images of records: decoded, named by their pixels, and sized as the teacher's processor does."""

import hashlib
import io
import re
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...storage.errors import RowError
from ...storage.keys import content_key
from ..models.fit.processor import channels_of, processor_id

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..models.image_classification import Images

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""As Pillow calls them. Its other readers run programs, or read what is no image."""
_DEEP = ("I", "F")
"""Modes of more than 8 bits a channel begin so: nothing says which part of their range is seen."""
_OF_16_BITS = re.compile(r";16[BLN]")
"""How Pillow says it of the channels of a colour, of which it reads the upper half."""
_ADDRESS = re.compile(r" <_io\.BytesIO object at 0x[0-9a-f]+>")


class ImageRows:
    """Rows of `prompts` that are images, for one teacher."""

    def __init__(self, teacher_dir: Path, *, whole: bool) -> None:
        """Of a teacher that reads images.

        Args:
            teacher_dir: With its config and its processor's; weights need not be there.
            whole: Make what is stored of an image; else the names alone, as a plan needs them.
        """
        self._folder, self._whole = teacher_dir, whole
        self._mode = "L" if channels_of(teacher_dir) == 1 else "RGB"
        self._processor_id = processor_id(teacher_dir)

    def named(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row whose `image` is as the record has it becomes one with names and the stored image.

        Raises:
            RowError: it is no image that can be read.
        """
        image = decoded(row["image"], self._mode)
        # The pixels, not the file: the same image as PNG and in a table is one prompt.
        pixels = hashlib.sha256(image.tobytes()).hexdigest()
        prompt = content_key("prompt", image=[image.mode, *image.size, pixels])
        key = content_key(
            "prompts",
            prompt=prompt,
            format=row["format"],
            label=row["label"],
            processor=self._processor_id,
        )
        stored = self._images.read(image) if self._whole else None
        return row | {"prompt_key": prompt, "key": key, "image": stored}

    @cached_property
    def _images(self) -> "Images":
        from ..models.image_classification import Images

        return Images(self._folder)


def decoded(value: Any, mode: str) -> "Image":
    """A record's image: upright, of 8 bits a channel, in this mode of Pillow (`L` or `RGB`).

    Raises:
        RowError: it is none, is broken, moves, is too large or has more than 8 bits.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(_file(value)), formats=FORMATS) as opened:
            _refuse_large(opened)
            # A camera's JPEG may carry a preview or a depth map behind the picture.
            if opened.format != "MPO" and getattr(opened, "n_frames", 1) > 1:
                raise RowError(
                    "unreadable", "image has several frames, expected one that does not move"
                )
            if opened.mode.startswith(_DEEP) or _OF_16_BITS.search(str(opened.tile)):
                why = f"image has more than 8 bits a channel (mode {opened.mode}). Save it with 8"
                raise RowError("unreadable", why)
            upright = ImageOps.exif_transpose(opened)
            made: Image.Image = upright.convert(mode)
            return made
    except RowError:
        raise
    except Image.DecompressionBombError as error:
        raise RowError("too_large", f"image is refused by Pillow: {error}") from error
    except Exception as error:  # Pillow's plugins raise whatever a damaged file leads them to
        said = _ADDRESS.sub("", str(error))
        what = f"image cannot be read ({type(error).__name__}: {said})"
        raise RowError("unreadable", f"{what}. Expected {', '.join(FORMATS)}") from error


def _refuse_large(image: "Image") -> None:
    from PIL import Image

    most = Image.MAX_IMAGE_PIXELS
    if most is not None and image.width * image.height > most:
        size = f"{image.width} x {image.height}"
        raise RowError("too_large", f"image is {size} pixels, more than {most:,}. Save it smaller")


def _file(value: Any) -> bytes:
    """The bytes of an image's file: alone, or as `datasets` has them, beside a path."""
    found = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(found, bytes) and found:
        return found
    if isinstance(value, dict) and value.get("path"):
        why = f"names the file {value['path']!r} and has no bytes, and such files are not followed"
        raise RowError("unreadable", f"image {why}. Name the folder of the images as the source")
    if value is None or found == b"":
        raise RowError("empty", "image is empty")
    kind = "text" if isinstance(value, str) else f"a {type(value).__name__}"
    raise RowError("unreadable", f"image is {kind}, expected the bytes of an image's file")
