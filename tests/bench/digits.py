"""Image classification: digits written by hand.

A ResNet is trained on the spot, and small MobileNets learn from it.

    python tests/bench/digits.py DIR [--seeds 0,1,2] [--tiny]

The images are the 10,000 of MNIST's test file (vision/mnist-t10k of the assets), 28 by 28 and grey.
The hash of its pixels says whether an image is learnt from, chooses learning rates, or judges; what
judges is read once.

The teacher learns the labels of all training images. Students learn from some of these: from their
labels alone, and from the teacher's distributions as well. Each has the learning rate whose
cross-entropy on validation images is best at the first seed. The last line is JSON.
"""

import gzip
import io
import struct
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import token_types
import torch
from assets import ASSETS
from PIL import Image
from torch.nn import functional
from transformers import ConvNextImageProcessorPil, ResNetConfig, ResNetForImageClassification

PARTS = {"test": 0.2, "validation": 0.3, "train": 1.0}
"""Part -> the share of images up to which it goes, in the order of the hashes of their pixels."""
MEAN, DEVIATION = 0.1325, 0.3105  # of all pixels, 0 to 1


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes of everything."""

    train: int = 7000
    """Images that the teacher learns from."""
    student: int = 600
    """Of these, those that students learn from."""
    judged: int = 1000
    """Images of validation and of test, each, at most."""
    sizes: tuple[int, ...] = (16, 32, 64)
    """Channels of the teacher's stages."""
    teacher_epochs: int = 4
    epochs: int = 12
    rates: tuple[float, ...] = (1e-3, 3e-3, 9e-3)


SCALES = {
    "cpu": Scale(),
    "tiny": Scale(
        train=60, student=24, judged=16, sizes=(8,), teacher_epochs=1, epochs=1, rates=(3e-3,)
    ),
}
STUDENT = {
    "model_type": "mobilenet_v2",
    "depth_multiplier": 0.15,
    "min_depth": 8,
    "output_stride": 8,
    "finegrained_output": False,
    "classifier_dropout_prob": 0.0,
}


def digits() -> tuple[np.ndarray, np.ndarray]:
    """[n, 28, 28] uint8, and [n] the digit that each is."""
    folder = ASSETS / "vision" / "mnist-t10k"
    return (
        _read(folder / "t10k-images-idx3-ubyte.gz"),
        _read(folder / "t10k-labels-idx1-ubyte.gz"),
    )


def _read(path: Path) -> np.ndarray:
    """An array as MNIST has it: a header with its rank and its sides, then its bytes."""
    content = gzip.decompress(path.read_bytes())
    rank = content[3]
    sides = struct.unpack(f">{rank}I", content[4 : 4 + 4 * rank])
    return np.frombuffer(content[4 + 4 * rank :], np.uint8).reshape(sides)


def parts(images: np.ndarray, scale: Scale) -> dict[str, np.ndarray]:
    """Part -> indices of its images, in the order of their hashes."""
    places = np.array([_fraction(image.tobytes()) for image in images])
    wanted = {"train": scale.train, "validation": scale.judged, "test": scale.judged}
    found, ordered, begin = {}, np.argsort(places), 0.0
    for part, end in PARTS.items():
        inside = ordered[(places[ordered] >= begin) & (places[ordered] < end)]
        found[part], begin = inside[: wanted[part]], end
    return found | {"student": found["train"][: scale.student]}


def _fraction(content: bytes) -> float:
    """A number in [0, 1) that only the content decides."""
    return int.from_bytes(sha256(content).digest()[-6:], "big") / 2**48


def write_part(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """A table of images and labels, as `datasets` writes one."""
    files = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        files.append({"bytes": file.getvalue(), "path": None})
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array(files, kind), "label": labels.astype(int)}), path)


def train_teacher(folder: Path, images: np.ndarray, labels: np.ndarray, scale: Scale) -> None:
    """A ResNet that has learnt these labels, with its processor; saved."""
    torch.manual_seed(0)
    names = [f"digit {number}" for number in range(10)]
    config = ResNetConfig(
        num_channels=1,
        embedding_size=scale.sizes[0],
        hidden_sizes=list(scale.sizes),
        depths=[1] * len(scale.sizes),
        layer_type="basic",
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
    )
    model = ResNetForImageClassification(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy((images[:, None] / 255 - MEAN) / DEVIATION).float()
    gold = torch.from_numpy(labels.astype(np.int64))
    for epoch in range(scale.teacher_epochs):
        for part in np.array_split(rng.permutation(len(images)), max(1, len(images) // 64)):
            logits = model(pixel_values=pixels[part]).logits
            loss = functional.cross_entropy(logits, gold[part])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"teacher: epoch {epoch + 1}, loss {float(loss):.3f}", flush=True)
    model.save_pretrained(folder)
    ConvNextImageProcessorPil(
        size={"shortest_edge": 28}, crop_pct=1.0, image_mean=[MEAN], image_std=[DEVIATION]
    ).save_pretrained(folder)


class Bench(token_types.Bench):
    """The folder of a run."""

    task, format, ending, tokens_per_step = "image_classification", "images", "parquet", 32
    measures = ("accuracy", "f1_macro", "cross_entropy", "kl_teacher", "ece")
    student = STUDENT

    def prepare(self) -> None:
        """Images and teacher, unless they are there."""
        if (self.folder / "teacher" / "preprocessor_config.json").is_file():
            return
        images, labels = digits()
        found = parts(images, self.scale)
        for name, some in found.items():
            write_part(self.folder / f"{name}.parquet", images[some], labels[some])
        some = found["train"]
        train_teacher(self.folder / "teacher", images[some], labels[some], self.scale)


if __name__ == "__main__":
    token_types.compare_arms(Bench, SCALES, __doc__)
