"""What stored targets are worth to a student.

There is one teacher and one store, with arms side by side at equal student tokens.

    python tests/bench/targets.py DIR [--scale cpu|h200] [--tiny] [--arms a,b] [--seeds 0,1,2]
                                      [--report]

The bench makes its own corpus of the Python sources of installed packages (held out by package),
trains a teacher on most of it, scores a small part with every kind of target, and trains the same
student on that part again and again: on the text alone, with the live teacher in the loop, and from
the store. Everything that is done stays in DIR: a second call goes on, arm by arm. `--arms` takes
names of arms, `angles` and `estimators`; `--report` trains nothing. In DIR: report.md, report.json,
arms.svg, angles.svg. The last line is JSON.
"""

import json
import os
from argparse import ArgumentParser
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from estimators import at_equal_ids, by_entropy, distinct_ids, measured, zipf_case
from python_corpus import Shares, write_corpus
from python_teacher import TeacherSize, train_teacher
from target_angles import ESTIMATORS, angles, kept_of, reference_positions
from target_arms import ARMS, DECISIVE, ROUNDS, TOPK, Bench
from target_report import report

OTHERS = ("estimators", "angles")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes of everything."""

    shares: Shares
    vocab_size: int
    teacher: TeacherSize
    student: dict[str, float]
    documents: int | None
    """How many of the student's texts it sees; None: all."""
    train: dict[str, Any]
    evaluate_tokens: int
    angle_tokens: int
    seeds: tuple[int, ...]
    positions: int
    """Of the teacher, on which estimators are compared."""
    arms: tuple[str, ...] = (*DECISIVE, *(name for name in ARMS if name not in DECISIVE))
    estimators: tuple[str, ...] = ESTIMATORS
    """Whose gradients are compared."""


SCALES = {
    "tiny": Scale(
        shares=Shares(
            package=200_000, teacher=150_000, student=6_000, held_out=4_000, excerpt=1000, files=150
        ),
        vocab_size=300,
        teacher=TeacherSize(
            hidden=32,
            layers=1,
            head_dim=16,
            window=32,
            tokens=20_000,
            step_tokens=512,
            learning_rate=5e-3,
        ),
        student={"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1},
        documents=None,
        train={
            "tokens": 1500,
            "tokens_per_step": 256,
            "tokens_per_pass": 512,
            "learning_rate": 5e-3,
        },
        evaluate_tokens=500,
        angle_tokens=512,
        seeds=(0,),
        positions=32,
        arms=("ce", "full", "top3-bucket", "sampled4-systematic"),
        estimators=("top3-drop", "top3-bucket", "sampled4-systematic"),
    ),
    "cpu": Scale(
        shares=Shares(
            package=4_000_000, teacher=30_000_000, student=400_000, held_out=150_000, excerpt=1500
        ),
        vocab_size=2048,
        teacher=TeacherSize(
            hidden=192,
            layers=4,
            head_dim=32,
            window=128,
            tokens=4_000_000,
            step_tokens=2048,
            learning_rate=3e-3,
        ),
        student={
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "initializer_range": 0.1,
        },
        documents=200,
        train={
            "epochs": 3,
            "tokens_per_step": 512,
            "tokens_per_pass": 512,
            "learning_rate": 3e-3,
            "warmup_fraction": 0.1,
        },
        evaluate_tokens=20_000,
        angle_tokens=65_536,
        seeds=(0, 1, 2),
        positions=256,
    ),
    "h200": Scale(
        shares=Shares(
            package=30_000_000,
            teacher=200_000_000,
            student=12_000_000,
            held_out=400_000,
            excerpt=4000,
        ),
        vocab_size=16_384,
        teacher=TeacherSize(
            hidden=640,
            layers=12,
            head_dim=64,
            window=512,
            tokens=150_000_000,
            step_tokens=65_536,
            learning_rate=1e-3,
        ),
        student={"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4},
        documents=None,
        train={
            "epochs": 6,
            "tokens_per_step": 16_384,
            "tokens_per_pass": 16_384,
            "learning_rate": 2e-3,
        },
        evaluate_tokens=30_000,
        angle_tokens=65_536,
        seeds=(0, 1, 2),
        positions=256,
    ),
}


def write_recipe(folder: Path, scale: Scale) -> None:
    """The recipe that every arm changes a little."""
    heads = int(scale.student["hidden_size"]) // scale.teacher.head_dim
    recipe = {
        "run": {"dir": str(folder / "runs" / "base")},
        "storage": {"dir": str(folder / "store"), "commit_rows": 8192},
        "teacher": {"model": str(folder / "teacher")},
        "student": {
            "config": scale.student | {"num_attention_heads": heads, "num_key_value_heads": heads}
        },
        "data": {
            "source": str(folder / "student.jsonl"),
            "format": "text",
            "window_tokens": scale.teacher.window,
            "limit": scale.documents,
            "holdout": 0,
        },
        "score": TOPK,
        "train": scale.train,
        "evaluate": {
            "tokens": scale.evaluate_tokens,
            "gradient_tokens": 0,
        },  # `target_angles.py` has the gradients
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe, indent=1))  # JSON is YAML


def prepare(folder: Path, scale: Scale) -> None:
    """Corpus, tokenizer and teacher, unless they are there."""
    (folder / "teacher").mkdir(parents=True, exist_ok=True)
    if not (folder / "corpus.json").is_file():
        print("reading the sources of installed packages", flush=True)
        write_corpus(folder, scale.shares, vocab_size=scale.vocab_size)
    if not (folder / "teacher" / "model.safetensors").is_file():
        ids = np.load(folder / "teacher.npy", mmap_mode="r")
        train_teacher(folder / "teacher", ids, size=scale.teacher, vocab_size=scale.vocab_size)
    if not (folder / "recipe.yaml").is_file():
        write_recipe(folder, scale)


def estimators(bench: Bench, scale: Scale) -> dict[str, Any]:
    """What the estimators are worth on this teacher's held-out positions, and on Zipf's law."""
    _, held_out = bench.prepare(ARMS["ce"])
    t = reference_positions(bench, held_out, scale.positions)
    drawn = {
        f"{draw} {rounds}": measured(t, rounds=rounds, draw=draw, repeats=8)
        for draw in ("multinomial", "systematic")
        for rounds in ROUNDS
    }
    return {
        "zipf": zipf_case(),
        "positions": len(t),
        "distinct_ids": distinct_ids(t),
        "measured": drawn,
        "at_equal_ids": {name: at_equal_ids(part.float()) for name, part in by_entropy(t).items()},
    }


def _once(file: Path, make: Any) -> None:
    """Write what `make` gives as JSON, unless it is there."""
    if not file.is_file():
        file.write_text(json.dumps(make()))


def measure(bench: Bench, scale: Scale, *, names: tuple[str, ...], seeds: tuple[int, ...]) -> None:
    """Everything that is asked for and not there yet."""
    for seed in seeds:
        for name in [n for n in names if n not in OTHERS]:
            found = bench.run(name, seed)
            print(
                f"{name}, seed {seed}: cross-entropy {found['cross_entropy']:.4f} nats", flush=True
            )
            _once(bench.results / f"kept-{name}.json", lambda name=name: kept_of(bench, ARMS[name]))
    if "estimators" in names:
        _once(bench.folder / "estimators.json", lambda: estimators(bench, scale))
    if "angles" in names:
        _once(
            bench.folder / "angles.json",
            lambda: angles(bench, scale.angle_tokens, names=scale.estimators),
        )


def main() -> None:
    """Parse the command line, measure, show."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scale", choices=["cpu", "h200"], default="cpu")
    parser.add_argument("--tiny", action="store_true", help="seconds; shows nothing")
    parser.add_argument("--arms", help=f"some of {', '.join((*ARMS, *OTHERS))}; all if left out")
    parser.add_argument("--seeds", help="as 0,1,2")
    parser.add_argument("--report", action="store_true", help="of what is there already")
    arguments = parser.parse_args()
    scale = SCALES["tiny" if arguments.tiny else arguments.scale]
    names = tuple(arguments.arms.split(",")) if arguments.arms else (*scale.arms, *OTHERS)
    if unknown := set(names) - {*ARMS, *OTHERS}:
        parser.error(
            f"--arms: there is no {', '.join(sorted(unknown))}. There are "
            f"{', '.join((*ARMS, *OTHERS))}."
        )
    folder = arguments.folder.resolve()
    prepare(folder, scale)
    bench = Bench(folder)
    if not arguments.report:
        seeds = tuple(map(int, arguments.seeds.split(","))) if arguments.seeds else scale.seeds
        measure(bench, scale, names=names, seeds=seeds)
    lines, outcome = report(folder)
    print("\n".join(lines))
    about = {"bench": "targets", "threads": torch.get_num_threads(), "cpus": os.cpu_count()}
    found = json.loads(
        json.dumps(about | outcome), parse_float=lambda number: float(f"{float(number):.6g}")
    )
    (folder / "report.json").write_text(json.dumps(found) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
