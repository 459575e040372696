"""The two tasks of the comparison.

They have rows, teachers, the shape of their students, and how long these train.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from assets import ASSETS
from small_teacher import Sentences, Size, naive_bayes, read_texts, train_teacher
from ways_arms import Task, causal_arms, classify_arms

STORIES = ASSETS / "models" / "stories260k-llama-hd32"
LAST_OF_STORIES = 4
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes of everything."""

    teacher: Size
    texts: Mapping[str, int | None]
    """Of each of banking77's splits the first so many; None: all."""
    rates: Mapping[str, tuple[float, ...]]
    """Learning rates of each task."""
    epochs: Mapping[str, float]
    stories: Mapping[str, int]
    """Of each of TinyStories' splits the first so many."""


SCALES = {
    "cpu": Scale(
        teacher=Size(
            hidden=96, layers=4, epochs=12, learning_rate=1e-3, masked=0.2, attention_dropout=0.0
        ),
        texts=dict.fromkeys(SPLITS),
        rates={
            "classify": (1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2),
            "causal": (1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2, 4.8e-2),
        },
        epochs={"classify": 4, "causal": 1},
        stories={"train": 600, "validation": 40, "test": 80},
    ),
    "tiny": Scale(
        teacher=Size(hidden=16, layers=2, epochs=1, learning_rate=1e-3),
        texts={"train": 160, "validation": 20, "test": 40},
        rates={"classify": (2e-3,), "causal": (3e-3,)},
        epochs={"classify": 1, "causal": 1},
        stories={"train": 6, "validation": 2, "test": 2},
    ),
}


def tasks(folder: Path, scale: Scale) -> dict[str, Task]:
    """Both, for a folder."""
    return {
        "classify": _classify(folder, scale),
        "causal": _causal(folder, scale),
    }


def _classify(folder: Path, scale: Scale) -> Task:
    size, no_dropout = scale.teacher, {"attention_probs_dropout_prob": 0.0}
    student = {
        "hidden_size": size.hidden * 2 // 3 // size.heads * size.heads,
        "intermediate_size": size.hidden * 8 // 3,
        "num_hidden_layers": size.layers // 2,
        **no_dropout,
    }
    recipe = {
        "run": {"task": "classification"},
        "teacher": {"model": str(folder / "teacher")},
        "student": {"config": student},
        "data": {"source": str(folder / "texts"), "split": "train", "format": "labelled"},
        "score": {"targets": "full", "batch_tokens": 2048},
        "train": {
            "epochs": scale.epochs["classify"],
            "tokens_per_step": 512,
            "schedule": "linear",
            "final_fraction": 0.0,
        },
    }
    return Task(
        name="classify",
        arms=classify_arms(size.layers - 1, narrow=no_dropout),
        held_out={s: {"split": s} for s in SPLITS[1:]},
        base="logits",
        measures={"accuracy": "accuracy %", "cross_entropy": "cross-entropy", "kl_teacher": "KL"},
        better=1,
        recipe=recipe,
    )


def _causal(folder: Path, scale: Scale) -> Task:
    recipe = {
        "run": {"task": "causal_lm"},
        "teacher": {"model": str(STORIES)},
        "student": {
            "config": {
                "hidden_size": 40,
                "intermediate_size": 112,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 16,
            }
        },
        "data": {
            "source": str(ASSETS / "text" / "tinystories-8k"),
            "split": "train",
            "format": "text",
            "limit": scale.stories["train"],
        },
        "score": {"targets": "topk", "k": 16},
        "train": {"epochs": scale.epochs["causal"], "tokens_per_step": 1024},
    }
    judged = {"gradient_tokens": 0, "samples": 0}
    return Task(
        name="causal",
        arms=causal_arms(LAST_OF_STORIES),
        held_out={s: {"split": s, "limit": scale.stories[s], **judged} for s in SPLITS[1:]},
        base="logits",
        measures={"cross_entropy": "cross-entropy", "kl_teacher": "KL"},
        better=-1,
        recipe=recipe,
    )


def make_teacher(folder: Path, scale: Scale) -> None:
    """The classifier's texts and teacher, unless they are there."""
    if (folder / "teacher.json").is_file():
        return
    parts = _texts(scale)
    (folder / "texts").mkdir(exist_ok=True)
    for split, part in parts.items():
        table = pa.table({"text": part.texts, "label": pa.array(part.labels, pa.int32())})
        pq.write_table(table, folder / "texts" / f"{split}.parquet")
    about = json.loads((ASSETS / "classify" / "banking77" / "labels.json").read_text())
    train_teacher(
        folder / "teacher",
        parts["train"],
        parts["validation"],
        size=scale.teacher,
        names=about["label_names"],
    )
    facts = {
        "naive_bayes": naive_bayes(parts["train"], parts["test"], _words),
        "rows": {split: len(part) for split, part in parts.items()},
    }
    (folder / "teacher.json").write_text(json.dumps(facts))


def _texts(scale: Scale) -> dict[str, Sentences]:
    """banking77's own splits.

    A text is in one of them alone, the last that has it in any case and spacing.
    """
    parts = {split: read_texts("banking77", split, scale.texts[split]) for split in SPLITS}
    later: set[str] = set()
    for split in reversed(SPLITS):
        mine = parts[split]
        folded = ["".join(text.lower().split()) for text in mine.texts]
        parts[split] = mine.take([n for n, text in enumerate(folded) if text not in later])
        later.update(folded)
    return parts


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
