"""The arms of the experiment.

It says which targets each one reads, from one store for all, or a live teacher in the loop.

Students are trained and judged by the product's own stages (`arms.py`). Training texts and held-out
texts are two sources of one store: an arm's recipe names the held-out source and pins the snapshot
of the training texts, so no package is in both.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from arms import one_order, run_arm
from torch import nn

from stillroom.stages.loader.packing import Batch, Packing
from stillroom.stages.loader.samples import Sample
from stillroom.stages.models.head import hidden_states, split_head
from stillroom.stages.targets.batch import TargetBatch

MOST = 50
"""K of the stored topk targets; smaller K and topp are cuts of it."""
SMALL_K = (3, 5, 12)
P = 0.9
ROUNDS = (4, 13, 50)
TOPK: dict[str, Any] = {"targets": "topk", "k": MOST}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One student."""

    score: dict[str, Any]
    """Section of the recipe: what it reads of the store."""
    loss: dict[str, Any]
    live: bool = False
    """The teacher itself is asked at every step, for all of its distribution; what is stored is not
    read."""

    @property
    def stored(self) -> dict[str, Any]:
        """The section that fills the store for this arm."""
        return TOPK if self.score["targets"] in ("topk", "topp") else self.score


SOFT = {"soft_weight": 1.0, "hard_weight": 0.0}
ARMS = {
    "ce": Arm(score=TOPK, loss={"soft_weight": 0.0, "hard_weight": 1.0}),
    "full": Arm(score=TOPK, loss=SOFT, live=True),
    **{
        f"sampled{rounds}-{draw}": Arm(
            score={"targets": "sampled", "rounds": rounds, "draw": draw}, loss=SOFT
        )
        for rounds in ROUNDS
        for draw in ("multinomial", "systematic")
    },
    **{
        f"top{k}-{tail}": Arm(score={"targets": "topk", "k": k}, loss=SOFT | {"tail": tail})
        for k in (*SMALL_K, MOST)
        for tail in ("drop", "bucket", "to_label")
    },
    f"topp{P}-bucket": Arm(score={"targets": "topp", "p": P, "k": MOST}, loss=SOFT),
}
DECISIVE = (
    *(
        "ce",
        "full",
        "sampled50-multinomial",
        "sampled13-multinomial",
        "top3-drop",
        "top3-bucket",
        "top12-drop",
    ),
    *(
        "top12-bucket",
        "sampled4-multinomial",
        "sampled4-systematic",
        "top12-to_label",
        "top3-to_label",
    ),
    *("sampled13-systematic", "sampled50-systematic"),
)
"""Those that the expected order speaks of, first what it needs most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LivePacking(Packing):
    """Batches whose targets are made by the teacher on the spot.

    They are its distribution over the whole vocabulary.
    """

    teacher: nn.Module

    def batches(
        self, samples: Sequence[Sample], temperature: float | None = 1.0
    ) -> Iterator[Batch]:
        """The batches of `Packing`, at temperature 1."""
        for batch in Packing.batches(self, samples, None):
            yield replace(batch, targets=dense_targets(self.teacher, batch))


@torch.no_grad()
def dense_targets(teacher: nn.Module, batch: Batch) -> TargetBatch:
    """[N, V] log-probabilities of the teacher at the predicting positions, in float32."""
    head = split_head(teacher)
    device = head.weight.device
    hidden = hidden_states(
        teacher, input_ids=batch.token_ids.to(device), position_ids=batch.position_ids.to(device)
    )
    logprobs = head.logits(hidden.flatten(0, 1)[batch.predicting.to(device)]).log_softmax(-1)
    nothing_left = torch.full_like(logprobs[:, 0], -torch.inf)
    return TargetBatch(
        labels=batch.targets.labels.to(device), logprobs=logprobs, tail_logprob=nothing_left
    )


def load_teacher(folder: Path) -> nn.Module:
    """The teacher in float32, on the GPU where there is one."""
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()


class Bench:
    """The folder of a run: recipe, store, and a file per finished arm and seed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.recipe = folder, folder / "recipe.yaml"
        self.results = folder / "results"
        self.results.mkdir(parents=True, exist_ok=True)
        self._prepared: dict[str, tuple[str, str]] = {}

    def prepare(self, arm: Arm) -> tuple[str, str]:
        """Snapshots of the training texts with the arm's targets, and of the held-out texts.

        The held-out texts are scored in full.
        """
        score = _setting("score", arm.stored)
        if score not in self._prepared:
            own = [score, f"run.dir={self.folder / 'runs' / 'score'}"]
            train = run_arm(self.recipe, own, until="score")["snapshots"]["train"]
            held_out = run_arm(self.recipe, [*own, *self._held_out(train)], until="score")[
                "snapshots"
            ]["test"]
            self._prepared[score] = train, held_out
        return self._prepared[score]

    def run(self, name: str, seed: int) -> dict[str, Any]:
        """Train and judge one arm, or read what it was; the student's numbers."""
        arm, file = ARMS[name], self.results / f"{name}-{seed}.json"
        if not file.is_file():
            train, _ = self.prepare(arm)
            settings = [
                _setting("score", arm.score),
                _setting("loss", arm.loss),
                f"run.seed={seed}",
            ]
            settings += [
                f"run.dir={self.folder / 'runs' / f'{name}-{seed}'}",
                *self._held_out(train),
            ]
            with one_order():
                found = (
                    self._live(settings)
                    if arm.live
                    else run_arm(self.recipe, settings, report=False)
                )
            numbers = found["results"]["student"] | {
                key: found[key] for key in ("tokens", "steps", "parameters")
            }
            about = {
                "teacher": found["results"]["teacher"],
                "train_seconds": found["tokens"] / found["tokens_per_second"],
            }
            file.write_text(json.dumps({"arm": name, "seed": seed, **numbers, **about}))
        return json.loads(file.read_text())

    def _live(self, settings: list[str]) -> dict[str, Any]:
        make = partial(LivePacking, teacher=load_teacher(self.folder / "teacher"))
        with mock.patch("stillroom.stages.loader.packing.Packing", make):
            return run_arm(self.recipe, settings, report=False)

    def _held_out(self, snapshot: str) -> list[str]:
        source = self.folder / "held_out.jsonl"
        count = (
            len(source.read_text().splitlines()) - 1
        )  # a recipe trains on something: one text is not held out
        return [
            f"data.source={source}",
            "data.limit=null",
            f"data.holdout={count}",
            f"train.snapshot={snapshot}",
        ]


def _setting(section: str, settings: dict[str, Any]) -> str:
    return f"{section}={json.dumps(settings)}"
