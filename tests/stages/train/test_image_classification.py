"""Image classification.

It is tested for a distribution for each image in the store, its loss, a student that goes on, and
refusals.
"""

import json
import struct
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_classes import rows_of
from tiny_images import CLASSES, SIDE, STUDENT, Pictures, encoded, picture, save_tiny_resnet
from tiny_store import StopAfter
from transformers import AutoImageProcessor, AutoModelForImageClassification

from stillroom.pipeline.plan.plan import make_plan
from stillroom.stages.data.images import ImageRows, decoded
from stillroom.stages.data.stage import survey
from stillroom.stages.evaluate import stage as evaluate
from stillroom.stages.loader.image_classification import ImagePasses, training_passes
from stillroom.stages.loader.samples import Samples
from stillroom.stages.losses.objective import aim_at
from stillroom.stages.models.identity import FileHashes, identify
from stillroom.stages.models.image_classification import Images, of_classes
from stillroom.stages.recipe.checks.together import check_together
from stillroom.stages.recipe.run_folder import TRAINED
from stillroom.stages.recipe.sections import Recipe
from stillroom.stages.train import stage as train
from stillroom.storage.errors import RowError, Stopped, UsageError
from stillroom.storage.integrity.verify import verify
from stillroom.storage.snapshots.snapshot import load_snapshot

COUNT = 30
RESNET = {"embedding_size": 6, "hidden_sizes": [6], "depths": [1]}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    folder = tmp_path_factory.mktemp("images")
    teacher = save_tiny_resnet(folder / "teacher")
    return Pictures(folder, teacher, COUNT, student={"config": RESNET}).scored()


def numbers_of(world: Pictures) -> dict[bytes, int]:
    """Prompt key -> number of the picture, by its file."""
    rows = world.rows("prompts")
    return {row["prompt_key"]: int(Path(row["source"]).stem) for row in rows}


class TestStore:
    @pytest.mark.numeric
    def test_a_row_is_what_transformers_says_of_the_file(self, world: Pictures) -> None:
        model = AutoModelForImageClassification.from_pretrained(world.teacher).eval()
        processor = AutoImageProcessor.from_pretrained(world.teacher, backend="pil")
        numbers, rows = numbers_of(world), world.rows()
        assert len(rows) == COUNT
        for row in rows:
            number = numbers[row["prompt_key"]]
            inputs = processor(images=picture(number), return_tensors="pt")
            with torch.no_grad():
                expected = model(**inputs).logits[0].double().log_softmax(-1)
            # Norms and convolutions in float32, a few hundred terms each.
            np.testing.assert_allclose(row["logprobs"], expected, atol=2e-5)
            assert row["label"] == (None if number % 7 == 6 else number % 3)
            assert (row["kind"], row["k"], row["token_ids"].tolist()) == ("full", 3, [0])
        assert verify(world.store).ok

    def test_only_shards_of_images_are_of_the_version_that_has_them(self, world: Pictures) -> None:
        versions = {
            table: world.store.shard(table, commit.shard.sha256).about["format_version"]
            for table in ("prompts", "generations", "soft_targets")
            for commit in world.store.commits(table)
        }
        assert versions == {"prompts": 3, "generations": 2, "soft_targets": 3}

    def test_an_image_is_one_row_wherever_it_comes_from(
        self, world: Pictures, tmp_path: Path
    ) -> None:
        import datasets
        import pyarrow as pa
        import pyarrow.parquet as pq

        some = [number for number in range(COUNT) if number % 7 != 6][:6]
        files = [{"bytes": encoded(picture(n), compress_level=1), "path": f"{n}.png"} for n in some]
        labels = [CLASSES[n % 3] for n in some]
        pq.write_table(pa.table({"image": files, "label": labels}), tmp_path / "rows.parquet")
        features = datasets.Features(
            image=datasets.Image(), label=datasets.ClassLabel(names=list(CLASSES))
        )
        rows = {"img": files, "label": [n % 3 for n in some]}
        saved = datasets.Dataset.from_dict(
            rows, features=datasets.Features(img=features["image"], label=features["label"])
        )
        saved.save_to_disk(tmp_path / "saved")
        keys = {row["key"] for row in world.rows("prompts")}
        for source in ("rows.parquet", "saved"):
            data = {"source": str(tmp_path / source), "format": "images", "holdout": 1}
            found = survey(
                world.changed(data=data),
                identify(
                    world.teacher, dtype="float32", hashes=FileHashes(tmp_path, remember=False)
                ),
            )
            assert len(found.inputs) == len(some)
            assert {*found.inputs["key"].to_pylist()} <= keys, source


def deep_png() -> bytes:
    """Colours of 16 bits, which Pillow reads and does not write: 2 x 2 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(2 * (1 + 2 * 3 * 2)))
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


class TestImages:
    def test_what_is_no_image_to_read_is_rejected_by_name(self) -> None:
        frames = [picture(n).resize((8, 8)) for n in range(2)]
        deep = encoded(Image.fromarray(np.zeros((4, 4), np.uint16)))
        for value, says in (
            (b"no image", "cannot be read"),
            (encoded(picture(0))[:200], "cannot be read"),
            ({"path": "a.png"}, "has no bytes"),
            (None, "is empty"),
            ("a.png", "is text"),
            (encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), "several frames"),
            (deep, "more than 8 bits"),
            (deep_png(), "more than 8 bits"),
        ):
            with pytest.raises(RowError, match=says) as caught:
                decoded(value, "RGB")
            assert "0x" not in str(caught.value), "one file, one sentence"

    def test_a_photo_with_its_preview_is_the_photo(self) -> None:
        photo, preview = picture(0), picture(1)
        both = encoded(photo, "MPO", save_all=True, append_images=[preview])
        assert decoded(both, "RGB").tobytes() == decoded(encoded(photo, "JPEG"), "RGB").tobytes()

    def test_a_bomb_is_rejected_before_it_is_unpacked(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        for side in (12, 40):  # beyond the limit Pillow warns, beyond twice it refuses
            with pytest.raises(RowError, match="pixels"):
                decoded(encoded(Image.new("RGB", (side, side))), "RGB")

    def test_modes_become_what_the_teacher_reads(self, tmp_path: Path) -> None:
        for mode in ("RGBA", "P", "L", "LA", "1"):
            found = decoded(encoded(picture(0, mode=mode)), "RGB")
            assert (found.mode, found.size) == ("RGB", picture(0).size)
        assert decoded(encoded(picture(0, mode="CMYK"), "JPEG"), "RGB").mode == "RGB"
        grey = save_tiny_resnet(tmp_path / "grey", num_channels=1)
        assert Images(grey).shape == (1, SIDE, SIDE)
        row = {"image": encoded(picture(0)), "format": "images", "label": None}
        made = ImageRows(grey, whole=True).named(row)
        (numbers,) = Images(grey).tensors([made["image"]])["pixel_values"]
        processor = AutoImageProcessor.from_pretrained(grey, backend="pil")
        whole = processor(images=picture(0, mode="L"), return_tensors="pt")["pixel_values"][0]
        assert torch.equal(numbers, whole)


@pytest.mark.numeric
class TestLoss:
    @pytest.mark.parametrize("images_per_pass", [1, 5, 100])
    def test_it_is_the_definition_summed_over_images(
        self, world: Pictures, images_per_pass: int
    ) -> None:
        """KL at temperature 2, T^2 times it, and cross-entropy where there is a label.

        It is so whoever shares a pass.
        """
        model = AutoModelForImageClassification.from_pretrained(
            save_tiny_resnet(world.folder / "other", seed=3)
        ).eval()
        samples = list(Samples(world.store, world.plan().snapshots["train"], soft=True).read(0, 12))
        images, aim, soft, hard = Images(world.teacher), aim_at(world.recipe.loss, 0.5), 0.0, 0.0
        for sample in samples:
            with torch.no_grad():
                (logits,) = model(**images.tensors([sample.image])).logits.double()
            assert sample.targets is not None
            teacher = torch.from_numpy(sample.targets.logprobs[0]).double()
            t, s = (teacher / 2).log_softmax(-1), (logits / 2).log_softmax(-1)
            soft += float(4 * (t.exp() * (t - s)).sum())
            hard -= 0.0 if sample.label is None else float(logits.log_softmax(-1)[sample.label])
        passes = ImagePasses(tokens_per_pass=images_per_pass, inputs=images, vocab_size=1)
        batches = list(passes.batches(samples, 2.0))
        sizes = [batch.positions for batch in batches]
        assert (sum(sizes), max(sizes) - min(sizes) <= 1) == (12, True)
        found = [passes.losses(model, one, aim=aim, dtype=torch.float32) for one in batches]
        # A few dozen float32 terms of about 1, a few eps each.
        assert sum(float(part.soft.sum()) for part in found) == pytest.approx(soft, rel=1e-5)
        assert sum(float(part.hard.sum()) for part in found) == pytest.approx(hard, rel=1e-5)


@pytest.mark.numeric
class TestTraining:
    def test_a_stopped_run_goes_on_to_the_same_student_with_its_norms(
        self, world: Pictures, tmp_path: Path
    ) -> None:
        train.run(world.job(tmp_path / "whole"))
        with pytest.raises(Stopped):  # between two passes of a step
            train.run(world.job(tmp_path / "stopped", stop=StopAfter(9)))
        train.run(world.job(tmp_path / "stopped"))
        one, other = (
            of_classes(CLASSES).student(tmp_path / name / "student" / "student").state_dict()
            for name in ("whole", "stopped")
        )
        assert all(torch.equal(one[name], other[name]) for name in one)
        averages = [name for name in one if name.endswith("running_mean")]
        assert any(one[name].abs().max() > 0 for name in averages)

    def test_evaluation_is_what_its_definitions_say(self, world: Pictures, tmp_path: Path) -> None:
        job = world.job(tmp_path)
        train.run(job)
        evaluate.run(replace(job, train_dirs={"student": tmp_path / "student"}))
        content = json.loads((tmp_path / "student" / "evaluation.json").read_text())
        folder = tmp_path / "student" / "student"
        model = AutoModelForImageClassification.from_pretrained(folder).eval()
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        numbers, kl, right, said = numbers_of(world), [], [], []
        for row in rows_of(world.store, load_snapshot(world.store, job.snapshots["test"])):
            inputs = processor(images=picture(numbers[row["prompt_key"]]), return_tensors="pt")
            with torch.no_grad():
                own = model(**inputs).logits[0].double().log_softmax(-1).numpy()
            teacher = row["logprobs"].astype(np.float64)
            kl.append(float((np.exp(teacher) * (teacher - own)).sum()))
            right += [] if row["label"] is None else [own.argmax() == row["label"]]
            said += [] if row["label"] is None else [(row["label"], int(own.argmax()))]
        student, measured = content["results"]["student"], content["measured_on"]
        assert student["kl_teacher"] == pytest.approx(np.mean(kl), rel=1e-4)
        assert student["accuracy"] == pytest.approx(np.mean(right))
        of_each = [
            2 * said.count((c, c)) / sum((pair[0] == c) + (pair[1] == c) for pair in said)
            for c in {c for pair in said for c in pair}
        ]
        assert student["f1_macro"] == pytest.approx(np.mean(of_each))
        cells = {(a, b): n for a, b, n in content["classes"]["arms"]["student"]["confusion"]}
        assert cells == Counter(said)
        assert (measured["of"], measured["tokens"], measured["labelled"]) == (
            "images",
            8,
            len(right),
        )


class TestRefusals:
    def refused(self, world: Pictures, message: str, **sections: Any) -> None:
        with pytest.raises(UsageError, match=message):
            make_plan(world.changed(**sections))

    def test_models_that_do_not_fit(self, world: Pictures, tmp_path: Path) -> None:
        from tiny_models import save_tiny_bert

        texts = {"model": str(save_tiny_bert(tmp_path / "texts"))}
        self.refused(world, "is a text classifier .*cannot distil", teacher=texts)
        other = {"model": str(save_tiny_resnet(tmp_path / "other", classes=("a", "b")))}
        self.refused(world, r"student\.model: .* has 2 classes .*, the teacher 3", student=other)
        grey = {"model": str(save_tiny_resnet(tmp_path / "grey", num_channels=1))}
        self.refused(world, "reads images of 1 channels, the teacher's have 3", student=grey)
        bare = save_tiny_resnet(tmp_path / "bare")
        (bare / "preprocessor_config.json").unlink()
        self.refused(world, "holds no preprocessor_config", teacher={"model": str(bare)})
        bert = {"config": {"model_type": "bert"}}
        self.refused(world, r"bert is .*, and run\.task image_classification distils", student=bert)

    @pytest.mark.parametrize(
        ("path", "value", "says"),
        [
            ("score.targets", "topk", "image_classification keeps every class"),
            ("score.features", [{"what": "hidden", "layers": [0]}], "of models of text alone"),
            ("data.format", "labelled", "image_classification reads 'images' records"),
            ("data.too_long", "cut", "an image has no tokens to cut"),
            ("generate.engine", "hf", "has no meaning for image_classification"),
            ("student.from_teacher_layers", [0], "no stage copies layers of it yet"),
        ],
    )
    def test_settings_that_do_not_fit(
        self, world: Pictures, path: str, value: Any, says: str
    ) -> None:
        tree = world.recipe.model_dump(mode="json")
        section, name = path.split(".")
        tree[section] = (tree[section] or {}) | {name: value}
        errors = check_together(Recipe.model_validate(tree))
        assert any(says in message for _, message in errors), errors

    def test_a_step_is_to_say_how_many_images_it_takes(self, world: Pictures) -> None:
        tree = world.recipe.model_dump(mode="json") | {"train": {"epochs": 1}}
        said = dict(check_together(Recipe.model_validate(tree)))
        assert "it counts images here" in said["train.tokens_per_step"]


class TestBatchNorms:
    """A MobileNet of images so small that a pass of one leaves the last norms a single number."""

    def recipe(self, world: Pictures, **sizes: int) -> Recipe:
        return world.changed(
            student={"config": STUDENT}, train={"epochs": 2, "tokens_per_step": 7} | sizes
        )

    @pytest.mark.numeric
    def test_an_image_that_is_left_over_joins_the_step_before(
        self, world: Pictures, tmp_path: Path
    ) -> None:
        images = 2 * world.plan().snapshots["train"].rows
        job = world.job(tmp_path, recipe=self.recipe(world, tokens_per_step=images - 1))
        train.run(job)
        record = json.loads((tmp_path / "student" / TRAINED).read_text())
        assert (record["samples"], record["steps"]) == (images, 1)

    @pytest.mark.parametrize(("name", "size"), [("tokens_per_step", 1), ("tokens_per_pass", 2)])
    def test_sizes_that_leave_one_alone_are_refused_before_the_first_step(
        self, world: Pictures, tmp_path: Path, name: str, size: int
    ) -> None:
        with pytest.raises(UsageError, match=rf"train\.{name}: {size} may leave a pass of one"):
            train.run(world.job(tmp_path, recipe=self.recipe(world, **{name: size})))

    def test_images_share_a_pass_of_256_where_nobody_says_how_many(self, world: Pictures) -> None:
        model = AutoModelForImageClassification.from_pretrained(world.teacher)
        said: dict[str, Any] = {"teacher_dir": world.teacher, "lengths": (1, 1)}
        for sizes, per_pass in (({}, 256), ({"tokens_per_pass": 8192}, 8192)):
            job = world.job(world.folder, recipe=self.recipe(world, **sizes))
            found = training_passes(model, job, dtype=torch.float32, **said)
            assert (found.tokens_per_pass, found.never_alone) == (per_pass, False)
