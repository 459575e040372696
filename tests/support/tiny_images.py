"""A small classification of images in this process.

It has random pictures, a tiny ResNet, and a store of both.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tiny_classes import World
from transformers import ConvNextImageProcessorPil, ResNetConfig, ResNetForImageClassification

from stillroom.stages.recipe.sections import Recipe

CLASSES = ("circle", "cross", "line")
SIDE = 16
STUDENT = {
    "model_type": "mobilenet_v2",
    "depth_multiplier": 0.1,
    "min_depth": 4,
    "depth_divisible_by": 4,
    "finegrained_output": False,
    "tf_padding": True,
}


def picture(number: int, *, mode: str = "RGB") -> Image.Image:
    """One of two shapes and sizes."""
    rng = np.random.default_rng(number)
    sides = (20, 24) if number % 2 else (18, 17)
    return Image.fromarray(rng.integers(0, 256, (*sides, 3), dtype=np.uint8)).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **how: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def write_folder(folder: Path, count: int) -> Path:
    """Pictures in a folder for each class; every seventh in the root, without one."""
    for number in range(count):
        parent = folder if number % 7 == 6 else folder / CLASSES[number % 3]
        parent.mkdir(parents=True, exist_ok=True)
        (parent / f"{number:03d}.png").write_bytes(encoded(picture(number)))
    return folder


def save_tiny_resnet(
    folder: Path, *, seed: int = 0, classes: tuple[str, ...] = CLASSES, **overrides: Any
) -> Path:
    """A small random ResNet whose norms have seen some images, with its processor."""
    config = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 12],
        depths=[1, 1],
        layer_type="basic",
        id2label=dict(enumerate(classes)),
        label2id={name: index for index, name in enumerate(classes)},
        **overrides,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ResNetForImageClassification(config).train()
        with torch.no_grad():
            for _ in range(3):
                model(pixel_values=torch.randn(8, config.num_channels, SIDE, SIDE))
            model.classifier[1].weight.mul_(20)  # else it is sure of nothing
    model.save_pretrained(folder)
    grey = {"image_mean": [0.4], "image_std": [0.3]} if config.num_channels == 1 else {}
    ConvNextImageProcessorPil(size={"shortest_edge": SIDE}, **grey).save_pretrained(folder)
    return folder


class Pictures(World):
    """A teacher, pictures in folders, and the stages done in this process."""

    def __init__(self, folder: Path, teacher: Path, count: int, **sections: Any) -> None:
        self.pictures = write_folder(folder / "pictures", count)
        super().__init__(folder, teacher, [], **sections)

    def changed(self, **sections: Any) -> Recipe:
        """The recipe with other sections."""
        own: dict[str, Any] = {
            "run": {"dir": str(self.folder / "run"), "task": "image_classification"},
            "data": {"source": str(self.pictures), "format": "images", "holdout": 8},
            "student": {"config": STUDENT},
            "train": {
                "epochs": 2,
                "tokens_per_step": 10,
                "tokens_per_pass": 6,
                "learning_rate": 1e-2,
            },
        }
        return super().changed(**own | sections)
