"""Finished runs without a model, and their report on disk.

A run has an evaluation, a training, and what the runner knows.
"""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

from stillroom.pipeline.report.report import write_report

RECIPE: dict[str, Any] = {
    "run": {"dir": "runs/stories", "seed": 0, "task": "causal_lm"},
    "storage": {"dir": "stores/stories"},
    "teacher": {"model": "models/big-stories", "dtype": "auto"},
    "student": {"model": None, "config": {"hidden_size": 64, "num_hidden_layers": 2}, "lora": None},
    "data": {"source": "prompts.jsonl", "format": "prompt", "holdout": 200},
    "generate": {"model": None, "samples": 2, "temperature": 1.0},
    "score": {"targets": "topk", "k": 64},
    "loss": {
        "divergence": "forward_kl",
        "temperature": 1.0,
        "tail": "bucket",
        "soft_weight": 1.0,
        "hard_weight": 0.1,
    },
    "train": {"tokens": 2_000_000},
}


def arm(
    cross_entropy: float, kl: float | None, agreement: float | None, ece: float
) -> dict[str, Any]:
    variation = kl and kl / (1 + kl)
    return {
        "cross_entropy": cross_entropy,
        "cross_entropy_se": 0.0123,
        "perplexity": 2.718281828459045**cross_entropy,
        "kl_teacher": kl,
        "kl_teacher_se": kl and 0.0045,
        "tv_teacher": variation,
        "tv_teacher_se": variation and 0.0023,
        "acceptance": None if variation is None else 1 - variation,
        "acceptance_se": variation and 0.0023,
        "top1_agreement": agreement,
        "top1_agreement_se": agreement and 0.0067,
        "ece": ece,
        "ece_se": 0.0012,
        "rows": 400,
        "tokens": 100_123,
    }


def difference(kl: float, error: float = 0.003) -> dict[str, float]:
    return {
        "kl_teacher": kl,
        "kl_teacher_se": error,
        "cross_entropy": kl / 2,
        "cross_entropy_se": error,
    }


def evaluation() -> dict[str, Any]:
    return {
        "results": {
            "teacher": arm(1.23456, 0.0, 1.0, 0.0123),
            "student_before": arm(9.87654, 8.7654, 0.0123, 0.2345),
            "baseline": arm(1.65432, 0.3531, 0.7123, 0.0345),
            "student": arm(1.61234, 0.3121, 0.7456, 0.0234),
        },
        "differences": {"student_before": difference(-8.4533), "baseline": difference(-0.041)},
        "reliability": {},
        "measured_on": {
            "snapshot": "5" * 32,
            "table": "soft_targets",
            "rows": 400,
            "prompts": 200,
            "tokens": 100_123,
            "reference": "full",
            "k": 32_000,
            "kl_is_lower_bound": False,
            "ece_bins": 15,
        },
        "arms": {},
        "answers": None,
        "samples": [
            {
                "prompt": "Once upon",
                "reference": "a time | there\nwas ```code```",
                "teacher": "a time | there\nwas ```code```",
                "student_before": "zzz",
                "baseline": "a hat",
                "student": "a time",
            }
        ],
    }


def train(loss: float) -> dict[str, Any]:
    history = [
        {
            "tokens": 8192 * i,
            "loss": loss * (1 + 1 / i) / 2,
            "soft": 0.9 * loss * (1 + 1 / i) / 2,
            "hard": loss * (1 + 1 / i) / 2,
            "learning_rate": 1e-3 / i,
        }
        for i in range(1, 101)
    ]
    return {
        "steps": 100,
        "tokens": 819_200,
        "scored_tokens": 700_001,
        "epochs": 1.5,
        "seconds": 321.5,
        "tokens_per_second": 2548.4,
        "parameters": 1_234_567,
        "snapshot": "7" * 32,
        "history": history,
    }


def facts() -> dict[str, Any]:
    return {
        "stages": {
            "generate": {
                "rows": 398,
                "tokens": 51_234,
                "bytes": 123_456,
                "seconds": 61.5,
                "tokens_per_second": 833.1,
            }
            | {"bytes_per_token": 2.41, "rejected": 2},
            "train": {"tokens": 819_200, "seconds": 321.5},
        },
        "rejects": {"generate": "too_long"},
        "store": "/stores/stories",
        "versions": {"torch": "2.13.0"},
        "machine": "Linux x86_64",
    }


def finished(
    run_dir: Path,
    evaluation: dict[str, Any],
    facts: dict[str, Any],
    recipe: dict[str, Any] = RECIPE,
    *,
    matched: str | None = None,
) -> Path:
    """`matched`: what of the teacher's features the training names."""
    trained = train(5.0)
    for point in trained["history"] if matched else ():
        point["features"] = {matched: 0.5}
    folders = {
        name: run_dir / f"train-{name}"
        for name in ("student", "baseline")
        if name in evaluation["results"]
    }
    evaluation["arms"] = {name: folder.name for name, folder in folders.items()}
    for folder in folders.values():
        folder.mkdir(parents=True)
        (folder / "train.json").write_text(json.dumps(trained))
    (folders["student"] / "settings.json").write_text(
        json.dumps({"recipe": recipe, "teacher_id": "ab" * 16})
    )
    (folders["student"] / "evaluation.json").write_text(json.dumps(evaluation))
    write_report(run_dir, folders["student"], facts)
    return run_dir


def with_features(recipe: dict[str, Any], layer: str = "3") -> dict[str, Any]:
    """The same recipe, which matches hidden states.

    `layer` is the teacher's, as a record spells it.
    """
    stored = [{"what": "hidden", "layers": [3], "bits": None}]
    asked = [{"match": "hidden", "layers": {layer: 1}, "weight": 1.0, "distance": "mse"}]
    changed = {"score": recipe["score"] | {"features": stored}}
    return recipe | changed | {"loss": recipe["loss"] | {"features": asked}}


def black_box(evaluation: dict[str, Any]) -> dict[str, Any]:
    changed = deepcopy(evaluation)
    del changed["results"]["baseline"], changed["differences"]["baseline"]
    changed["results"]["teacher"] = dict.fromkeys(changed["results"]["teacher"])
    for name in ("student_before", "student"):
        changed["results"][name] |= {
            "kl_teacher": None,
            "kl_teacher_se": None,
            "top1_agreement": None,
            "acceptance": None,
        }
    changed["differences"]["student_before"] = {"cross_entropy": -8.2642, "cross_entropy_se": 0.01}
    changed["measured_on"] |= {"reference": None, "k": None, "table": "generations"}
    return changed


NASTY = (" the", "</script><b>", "&amp;", "\n", "`|`", "\u65e5", "\ufffd", " <!--", " cat", "")


def views(rows: int = 2, tokens: int = 30) -> dict[str, Any]:
    """What an evaluation holds besides means, its texts such that would break a page."""
    arms = {"student_before": 2.0, "baseline": 0.5, "student": 0.25}

    def said(shift: int, kl: float | None) -> dict[str, Any]:
        found: dict[str, Any] = {
            "token": [round(0.9 / (1 + n), 4) for n in range(tokens)],
            "ids": [[(n + shift + i) % len(NASTY) for i in range(5)] for n in range(tokens)],
            "probabilities": [[0.5, 0.25, 0.1, 0.05, 0.0125] for _ in range(tokens)],
        }
        return (
            found
            if kl is None
            else found | {"kl": [round(kl * (n + 1) / 7, 4) for n in range(tokens)]}
        )

    def position(scale: float) -> list[dict[str, Any]]:
        return [{"tokens": 100 - n, "mean": scale / (n + 1), "se": 0.01 * scale} for n in range(7)]

    row = {
        "before": [0, 8],
        "cut_before": 3,
        "token_ids": [n % len(NASTY) for n in range(tokens)],
        "cut_after": 12,
        "teacher": said(0, None),
        "arms": {arm: said(number + 1, kl) for number, (arm, kl) in enumerate(arms.items())},
    }
    masses = [0.0, 0.5, 0.9, 0.99, 1.0]
    return {
        "lengths": {"edges": [0, 10, 20, 30], "rows": [3, 0, 250, 147], "mean": 24.5},
        "entropy": {
            "edges": [0.25 * i for i in range(57)],
            "tokens": [0] * 4 + list(range(1, 21)) + [0] * 33,
        },
        "kept_mass": {
            "kind": "topk",
            "k": 64,
            "p": None,
            "edges": masses,
            "tokens": [0, 5, 95, 800, 100],
        },
        "mass_by_k": {
            "tokens": 1000,
            "best": [{"k": 2**i, "mass": 1 - 0.5 ** (i + 1)} for i in range(9)],
        },
        "by_position": {
            "measure": "kl_teacher",
            "edges": [0, *(2**i for i in range(20))],
            "arms": {arm: position(scale) for arm, scale in arms.items()},
        },
        "rows": [{"key": f"{number:02x}" * 16, **row} for number in range(rows)],
        "pieces": {str(i): text for i, text in enumerate(NASTY)},
    }


def reliability() -> dict[str, list[dict[str, Any]]]:
    """Bins of every arm, the last of next to no tokens."""
    bins = [
        {"up_to": (n + 1) / 15, "tokens": 5000, "confidence": (n + 0.5) / 15, "accuracy": n / 15}
        for n in range(14)
    ]
    last = {"up_to": 1.0, "tokens": 3, "confidence": 0.98, "accuracy": 1 / 3}
    return {arm: [*bins, last] for arm in ("teacher", "student_before", "baseline", "student")}
