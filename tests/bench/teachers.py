"""What is left of two specialists in a student of both? TinyStories and Python, each with a teacher of its own.

    python tests/bench/teachers.py DIR [--tiny]        # a table, then one JSON line

Two teachers of one size and one tokenizer, one trained on stories, one on the sources of installed
packages. Students are fresh, and judged on held-out texts of both domains by their cross-entropy. Each
comes with a baseline of the same start, order and tokens that learns from the text alone; its gain on
a domain is the baseline's cross-entropy there minus its own.

    stories, code     of one teacher, on the texts of its domain
    unrouted          of both teachers, each asked for everything
    routed            of both, each asked for its own domain; as many tokens of each as a specialist has

The record says what share of each specialist's gain the others keep, seed by seed, with half of a 95 %
interval over the seeds. A run that was stopped goes on where it was.
"""

import json
from argparse import ArgumentParser
from collections.abc import Mapping
from dataclasses import dataclass
from os import environ
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import yaml
from arms import run_arm
from python_corpus import END, Shares, texts, train_tokenizer, write_documents
from python_teacher import TeacherSize, train_teacher
from transformers import AutoModelForCausalLM, AutoTokenizer

from stillroom.pipeline.report.seeds import interval

ASSETS = Path(environ.get("STILLROOM_ASSETS", Path(__file__).parents[3] / "shared" / "assets"))
DOMAINS = ("stories", "code")
CODE = "#!python\n"
"""Every document of Python begins with it: by this the teachers are asked."""
WHERE = {"code": f"starts_with(text, '{CODE.strip()}')"}
WHERE["stories"] = f"NOT {WHERE['code']}"
STUDENTS = ("stories", "code", "unrouted", "routed")
KEPT = 0.6
"""Of each specialist's gain, that a student of both is to keep."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes of everything."""

    vocab: int
    teacher: TeacherSize
    student: Mapping[str, int]
    characters: Mapping[str, int]
    """Of each domain: for the teacher, for the student, held out."""
    tokens: int
    """That a specialist is trained on; a student of both on twice as many."""
    seeds: tuple[int, ...]


SCALES = {
    "cpu": Scale(
        vocab=2048,
        teacher=TeacherSize(
            hidden=192, layers=6, head_dim=32, window=256, tokens=6_000_000, step_tokens=8192,
            learning_rate=2e-3,
        ),
        student={"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3},
        characters={"teacher": 6_000_000, "student": 1_500_000, "held_out": 150_000},
        tokens=800_000,
        seeds=(0, 1, 2),
    ),
    "tiny": Scale(
        vocab=320,
        teacher=TeacherSize(
            hidden=16, layers=1, head_dim=8, window=64, tokens=4_000, step_tokens=1024,
            learning_rate=2e-3,
        ),
        student={"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1},
        characters={"teacher": 30_000, "student": 6_000, "held_out": 2_000},
        tokens=2_000,
        seeds=(0,),
    ),
}  # fmt: skip


def write_texts(folder: Path, scale: Scale) -> None:
    """Texts of both domains, one tokenizer of both, and the two teachers, unless they are there."""
    if (folder / "texts.json").is_file():
        return
    parts = {"stories": stories(scale.characters), "code": code(scale.characters)}
    of_teachers = [text for domain in DOMAINS for text in parts[domain]["teacher"]]
    train_tokenizer(
        of_teachers[:: max(1, len(of_teachers) // 4000)], folder / "stories", vocab_size=scale.vocab
    )
    train_tokenizer(
        of_teachers[:: max(1, len(of_teachers) // 4000)], folder / "code", vocab_size=scale.vocab
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "stories")
    for domain in DOMAINS:
        ids = [tokenizer.encode(text + END) for text in parts[domain]["teacher"]]
        joined = np.concatenate([np.array(one, np.uint16) for one in ids])
        train_teacher(folder / domain, joined, size=scale.teacher, vocab_size=len(tokenizer))
    for name in ("student", "held_out"):
        documents = [text for domain in DOMAINS for text in parts[domain][name]]
        write_documents(folder / f"{name}.jsonl", documents)
    found = {domain: parts[domain]["held_out"] for domain in DOMAINS}
    (folder / "texts.json").write_text(json.dumps(found))


def stories(characters: Mapping[str, int]) -> dict[str, list[str]]:
    """Stories, as many characters to each part."""
    table = pq.read_table(ASSETS / "text" / "tinystories-8k" / "train.parquet", columns=["text"])
    left, found = iter(table["text"].to_pylist()), {}
    for name in ("held_out", "student", "teacher"):
        found[name], room = [], characters[name]
        for story in left:
            found[name].append(story)
            room -= len(story)
            if room <= 0:
                break
    return found


def code(characters: Mapping[str, int]) -> dict[str, list[str]]:
    """Sources, held out by package."""
    files = 400 if characters["teacher"] < 100_000 else None
    found = texts(Shares(package=400_000, excerpt=900, files=files, **characters))
    return {name: [CODE + text for text in part] for name, part in vars(found).items()}


def recipe(folder: Path, scale: Scale, student: str, seed: int) -> Path:
    """Of one student."""
    asked = [student] if student in DOMAINS else [*DOMAINS]
    route = {} if student == "unrouted" else WHERE
    teachers = [
        {"name": name, "model": str(folder / name)} | ({"where": route[name]} if route else {})
        for name in asked
    ]
    shape = {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": scale.student["hidden_size"] // 2,
    }
    tree = {
        "run": {"dir": str(folder / "runs" / f"{student}-{seed}"), "seed": seed},
        "storage": {"dir": str(folder / "store")},
        "teachers": teachers,
        "student": {"config": {**scale.student, **shape}},
        "data": {
            "source": str(folder / "student.jsonl"),
            "format": "text",
            "window_tokens": scale.teacher.window,
        },
        "score": {"targets": "topk", "k": 32},
        "train": {
            "tokens": scale.tokens * len(asked),
            "tokens_per_step": 4096,
            "learning_rate": 6.0e-3,
        },
        "evaluate": {
            "source": str(folder / "held_out.jsonl"),
            "baseline": True,
            "samples": 0,
            "gradient_tokens": 0,
        },
    }
    path = folder / f"{student}-{seed}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@torch.no_grad()
def cross_entropy(model_dir: Path, documents: list[str], window: int) -> float:
    """Nats a token over windows of some documents, each from its own beginning."""
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    total, tokens = 0.0, 0
    for text in documents:
        ids = torch.tensor(tokenizer.encode(text + END))
        for part in ids.split(window):
            if len(part) < 2:
                continue
            logprobs = model(input_ids=part[None]).logits[0, :-1].log_softmax(-1)
            total -= float(logprobs.gather(-1, part[1:, None]).sum())
            tokens += len(part) - 1
    return total / tokens


def gains(folder: Path, scale: Scale, student: str, seed: int) -> dict[str, float]:
    """Of a student over its baseline, on each domain."""
    done = run_arm(recipe(folder, scale, student, seed), report=False)
    run = Path(done["train_dir"]).parent
    held_out = json.loads((folder / "texts.json").read_text())

    def on(arm: str, domain: str) -> float:
        model = run / done["arms"][arm] / "student"
        return cross_entropy(model, held_out[domain], scale.teacher.window)

    return {domain: on("baseline", domain) - on("student", domain) for domain in DOMAINS}


def compare(folder: Path, scale: Scale) -> dict[str, Any]:
    """All students; of those of both, what they keep of each specialist's gain."""
    folder.mkdir(parents=True, exist_ok=True)
    write_texts(folder, scale)
    found = {s: [gains(folder, scale, s, seed) for seed in scale.seeds] for s in STUDENTS}
    kept = {
        student: {
            domain: interval(
                [
                    both[domain] / alone[domain]
                    for both, alone in zip(found[student], found[domain], strict=True)
                ]
            )
            for domain in DOMAINS
        }
        for student in ("unrouted", "routed")
    }
    means = {
        student: {domain: interval([one[domain] for one in seeds]) for domain in DOMAINS}
        for student, seeds in found.items()
    }
    enough = all(mean >= KEPT for mean, _ in kept["routed"].values())
    return {"gains": means, "kept": kept, "seeds": len(scale.seeds), "keeps_enough": enough}


def main() -> None:
    """A table, then one JSON line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiny", action="store_true")
    words = parser.parse_args()
    outcome = compare(words.folder, SCALES["tiny" if words.tiny else "cpu"])
    print(f"{'gain, nats/token':<20}" + "".join(f"{domain:>22}" for domain in DOMAINS))
    for student, of in outcome["gains"].items():
        print(f"{student:<20}" + "".join(f"{_shown(*of[domain]):>22}" for domain in DOMAINS))
    for student, of in outcome["kept"].items():
        print(f"{'kept, ' + student:<20}" + "".join(f"{_shown(*of[d]):>22}" for d in DOMAINS))
    print(json.dumps({"bench": "teachers", "results": outcome}))


def _shown(mean: float, half: float | None) -> str:
    return f"{mean:.4f}" + ("" if half is None else f" ± {half:.4f}")


if __name__ == "__main__":
    main()
