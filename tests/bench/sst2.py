"""Classification, and the comparison of losses that practitioners start from.

There is a sentiment teacher, and there are small students.

    python tests/bench/sst2.py DIR [--only teacher|pipeline|study] [--seeds 0,1,2] [--report]
                                   [--tiny]

teacher    a small BERT trained on sst2's labels, on the spot, in DIR/teacher
pipeline   pipeline/recipes/sst2.yaml from end to end: teacher, student on labels alone, student
           distilled; each arm at the learning rate whose cross-entropy on validation rows is best
study      forward, reverse, skew forward and skew reverse KL, with and without cross-entropy, from
           a fresh student and from one fine-tuned on labels; each at the learning rate whose
           accuracy on validation rows is best, and all at one common rate: forward KL's. 5,000
           training rows, two epochs, temperature 2

Everything that is done stays in DIR, student by student: a second call goes on. `--report` trains
nothing. The last line is JSON, which DIR/report.json has too, as DIR/report.md has the tables.
"""

import json
import os
from argparse import ArgumentParser
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from arms import run_arm
from assets import ASSETS
from small_teacher import Sentences, Size, naive_bayes, read_texts, train_teacher
from sst2_arms import ARMS, MISTAKES, STARTS, Choice, Study
from sst2_report import best_rate, report
from sst2_teacher import NAMES, VALIDATION, prompt_keys, split
from transformers.utils.logging import disable_progress_bar

RECIPE = Path(__file__).parents[2] / "pipeline" / "recipes" / "sst2.yaml"
PARTS = ("teacher", "pipeline", "study")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes of everything."""

    teacher: Size
    limit: int | None = None
    """Use the first training sentences only."""
    test: int | None = None
    """Judge on the first test sentences only."""
    validation: int = VALIDATION
    rows: int = 5000
    """Training rows of the study."""
    pipeline_rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3, 4e-3)
    rates: tuple[tuple[float, ...], tuple[float, ...]] = (
        (7.5e-4, 1.5e-3, 3e-3, 6e-3),
        (2e-4, 7.5e-4, 3e-3, 6e-3),
    )
    """Of the study, by start: fresh and fine-tuned."""
    arms: tuple[str, ...] = tuple(ARMS)
    mistakes: tuple[str, ...] = tuple(MISTAKES)
    tuning_epochs: int = 4
    settings: tuple[str, ...] = ()
    """More changes of the recipe."""


SCALES = {
    "cpu": Scale(teacher=Size(hidden=128, layers=4, epochs=8, learning_rate=5e-4)),
    "tiny": Scale(
        teacher=Size(hidden=16, layers=1, epochs=1, learning_rate=1e-3),
        limit=160,
        test=40,
        validation=20,
        rows=64,
        pipeline_rates=(2e-3,),
        rates=((2e-3,), (2e-3,)),
        arms=("labels", "forward_kl", "skew_forward_kl"),
        mistakes=("skew_forward_kl, no logarithm",),
        tuning_epochs=1,
        settings=(
            "data.limit=160",
            "evaluate.limit=40",
            "train.validation_prompts=20",
            "train.epochs=1",
            'student.config={"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}',
        ),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The folder of a run."""

    folder: Path
    scale: Scale

    def teacher(self) -> None:
        """Train the teacher, unless it is there."""
        folder = self.folder / "teacher"
        if not (folder / "model.safetensors").is_file():
            parts = self._split()
            size = self.scale.teacher
            train_teacher(folder, parts["train"], parts["validation"], size=size, names=NAMES)
            facts = {"naive_bayes": naive_bayes(parts["train"], parts["test"])}
            (self.folder / "teacher.json").write_text(json.dumps(facts))

    def _split(self) -> dict[str, Sentences]:
        train = read_texts("sst2", "train", self.scale.limit)
        test = read_texts("sst2", "test", self.scale.test)
        return split(train, test, validation=self.scale.validation)

    def overrides(self, name: str) -> list[str]:
        """Changes of the recipe that put all of it into this folder."""
        places = {"run.dir": f"runs/{name}", "storage.dir": "store", "teacher.model": "teacher"}
        return [
            *(f"{key}={self.folder / place}" for key, place in places.items()),
            *self.scale.settings,
        ]

    def pipeline(self, seeds: tuple[int, ...]) -> None:
        """Run the recipe itself at every learning rate at the first seed.

        Then it is run at each arm's best rate at all seeds.
        """
        trained: dict[tuple[str, float, int], Any] = {}

        def train(rate: float, seed: int) -> None:
            run_arm(RECIPE, self._settings(rate, seed), until="train")
            for file in (self.folder / "runs" / f"{rate:g}-{seed}").glob("train-*/train.json"):
                facts = json.loads(file.read_text())
                trained[facts["arm"], rate, seed] = facts
                nats = facts["best"]["hard"]
                print(
                    (
                        f"pipeline: {facts['arm']}, rate {rate:g}, seed {seed}: validation "
                        f"{nats:.4f} nats"
                    ),
                    flush=True,
                )

        rates = self.scale.pipeline_rates
        for rate in rates:
            train(rate, seeds[0])
        found: dict[str, Any] = {}
        for arm in ("baseline", "student"):
            validation = {rate: trained[arm, rate, seeds[0]]["best"]["hard"] for rate in rates}
            rate = min(validation, key=lambda rate: validation[rate])
            for seed in seeds[1:]:
                train(rate, seed)
            results = [run_arm(RECIPE, self._settings(rate, seed))["results"] for seed in seeds]
            found[arm] = {
                "rate": rate,
                "validation_cross_entropy": validation,
                "parameters": trained[arm, rate, seeds[0]]["parameters"],
                "results": [result[arm] for result in results],
            }
            found["teacher"] = {"results": [results[0]["teacher"]]}
        (self.folder / "pipeline.json").write_text(json.dumps(found))

    def _settings(self, rate: float, seed: int) -> list[str]:
        return [
            *self.overrides(f"{rate:g}-{seed}"),
            f"train.learning_rate={rate}",
            f"run.seed={seed}",
        ]

    def study(self, seeds: tuple[int, ...]) -> None:
        """Train the students of the comparison.

        It is the whole grid at the first seed, then what that chose at the others.
        """
        scale = self.scale
        study = Study(self.folder, RECIPE, self.overrides("score"), rows=scale.rows)
        for part, sentences in self._split().items():
            if set(prompt_keys(sentences.texts)) != study.prompts[part]:
                raise SystemExit(
                    f"the recipe's {part} rows are not those that the teacher was trained with in "
                    "mind"
                )
        facts = {
            "rows": study.rows,
            "teacher": study.teacher(),
            "seeds": seeds,
            "first_seed": seeds[0],
        }
        (self.folder / "study.json").write_text(json.dumps(facts))
        for start, rates in zip(STARTS, scale.rates, strict=True):
            if start == "fine-tuned":
                self._fine_tune(study, seeds)
            for arm in scale.arms:
                for rate in rates:
                    _say(study.run(Choice(arm=arm, start=start, rate=rate, seed=seeds[0])))
            for arm in scale.arms:
                self._settle(study, arm, start, seeds=seeds)
        for arm in scale.mistakes:
            for rate in scale.rates[0]:
                _say(study.run(Choice(arm=arm, start="fresh", rate=rate, seed=seeds[0])))
        common = best_rate(study.folder, "forward_kl", "fresh")
        for seed in seeds:
            for start in STARTS:
                for arm in scale.arms:
                    _say(study.run(Choice(arm=arm, start=start, rate=common, seed=seed)))

    def _settle(self, study: Study, arm: str, start: str, *, seeds: tuple[int, ...]) -> None:
        """Train at the best rate with every seed.

        It ends when the best rate is one that every seed was trained at.
        """
        rate = None
        while rate != (rate := best_rate(study.folder, arm, start)):
            for seed in seeds:
                _say(study.run(Choice(arm=arm, start=start, rate=rate, seed=seed)))

    def _fine_tune(self, study: Study, seeds: tuple[int, ...]) -> None:
        """Students to start from."""
        rate = best_rate(study.folder, "labels", "fresh")
        for seed in seeds:
            found = study.fine_tune(seed, rate=rate, epochs=self.scale.tuning_epochs)
            print(
                f"fine-tuned, seed {seed}: validation {found['validation']['accuracy']:.4f}",
                flush=True,
            )


def _say(found: dict[str, Any]) -> None:
    shown = (
        " ".join(f"{epoch['validation']['accuracy']:.4f}" for epoch in found["after"])
        or found["failed"]
    )
    name = f"{found['arm']}, {found['start']}, rate {found['rate']:g}, seed {found['seed']}"
    print(f"{name}: validation accuracy {shown}", flush=True)


def main() -> None:
    """Parse the command line, train, show."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=PARTS, help="all three if left out")
    parser.add_argument(
        "--seeds", default="0,1,2", help="the first one sees every learning rate of the study"
    )
    parser.add_argument("--report", action="store_true", help="of what is there already")
    parser.add_argument("--tiny", action="store_true", help="seconds; shows nothing")
    arguments = parser.parse_args()
    bench = Bench(
        folder=arguments.folder.resolve(), scale=SCALES["tiny" if arguments.tiny else "cpu"]
    )
    bench.folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("STILLROOM_ASSETS", str(ASSETS))  # the recipe asks for it
    disable_progress_bar()
    seeds = tuple(map(int, arguments.seeds.split(",")))
    wanted = () if arguments.report else (arguments.only,) if arguments.only else PARTS
    if wanted:
        bench.teacher()
    if "pipeline" in wanted:
        bench.pipeline(seeds)
    if "study" in wanted:
        bench.study(seeds)
    lines, outcome = report(bench.folder)
    print("\n".join(lines))
    print(
        json.dumps(
            {"bench": "sst2", "threads": torch.get_num_threads(), "cpus": os.cpu_count(), **outcome}
        )
    )


if __name__ == "__main__":
    main()
