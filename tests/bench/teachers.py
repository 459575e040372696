"""What is left of two specialists in a student of both?

TinyStories and Python, each with a teacher of its own.

    python tests/bench/teachers.py DIR [--jobs 1] [--tiny]        # a table, then one JSON line

The teacher of stories is stories260k; that of code is the same model, trained further on the
sources of installed packages. Students are fresh. Each is judged by its cross-entropy on held-out
texts of both domains, beside a baseline of the same start, order and tokens that learns from the
text alone; its gain on a domain is the baseline's cross-entropy there minus its own.

    stories, code     of one teacher, on the texts of its domain
    unrouted          of both teachers, each asked for every text
    routed            of both, each asked for its own domain; as many tokens of each as a specialist
                      has

The last two see the same texts in the same order, so one baseline serves both. The table says what
share of each specialist's gain they keep, seed by seed, with half of a 95 % interval over the
seeds. Everything that is done stays in DIR, student by student: a second call goes on.
DIR/report.json has the last line.
"""

import json
import shutil
from argparse import ArgumentParser
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import yaml
from arms import one_order, run_arm
from assets import ASSETS
from python_corpus import Shares, texts, write_documents
from python_teacher import TeacherSize, train_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from stillroom.pipeline.report.seeds import interval

STORIES = ASSETS / "models" / "stories260k-llama-hd32"
DOMAINS = ("stories", "code")
CODE = "#!python\n"
"""Every document of Python begins with it: by this the teachers are asked."""
WHERE = {"code": f"starts_with(text, '{CODE.strip()}')"}
WHERE["stories"] = f"NOT {WHERE['code']}"
STUDENTS = ("stories", "code", "routed", "unrouted")
KEPT = 0.6
"""Of each specialist's gain, that a student of both is to keep."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes of everything."""

    teacher: TeacherSize
    """Of code: how it is trained further."""
    student: Mapping[str, int]
    characters: Mapping[str, Mapping[str, int]]
    """Of each domain, about as many tokens of both: for the teacher, for the student, held out."""
    tokens: int
    """That a specialist is trained on; a student of both on twice as many."""
    seeds: tuple[int, ...]


def _teacher(**settings: Any) -> TeacherSize:
    shape = {"hidden": 64, "layers": 5, "head_dim": 8}  # as stories260k
    return TeacherSize(**shape, window=256, learning_rate=2e-3, autocast=False, **settings)


SCALES = {
    "cpu": Scale(
        teacher=_teacher(tokens=1_000_000, step_tokens=4096),
        student={
            "hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        },
        characters={
            "stories": {"student": 340_000, "held_out": 70_000},
            "code": {"teacher": 1_300_000, "student": 130_000, "held_out": 30_000},
        },
        tokens=480_000,
        seeds=(0, 1, 2),
    ),
    "tiny": Scale(
        teacher=_teacher(tokens=1_000, step_tokens=512),
        student={
            "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4,
        },
        characters={
            "stories": {"student": 3_000, "held_out": 800},
            "code": {"teacher": 3_000, "student": 1_200, "held_out": 400},
        },
        tokens=1_000,
        seeds=(0,),
    ),
}  # fmt: skip


def make_texts(folder: Path, scale: Scale) -> None:
    """Texts of both domains and the two teachers, unless they are there."""
    if (folder / "held_out.json").is_file():
        return
    found = {
        "stories": stories(scale.characters["stories"]),
        "code": code(scale.characters["code"]),
    }
    for domain in DOMAINS:
        shutil.copytree(STORIES, folder / domain, dirs_exist_ok=True)
    torch.manual_seed(0)
    ids = np.concatenate(encoded(found["code"]["teacher"])).astype(np.uint16)
    model = AutoModelForCausalLM.from_pretrained(STORIES)
    train_model(model, folder / "code", ids, size=scale.teacher)
    write_documents(
        folder / "texts.jsonl", [text for domain in DOMAINS for text in found[domain]["student"]]
    )
    held_out = {domain: found[domain]["held_out"] for domain in DOMAINS}
    _write(folder / "held_out.json", held_out)


def stories(characters: Mapping[str, int]) -> dict[str, list[str]]:
    """Stories, as many characters to each part."""
    table = pq.read_table(ASSETS / "text" / "tinystories-8k" / "train.parquet", columns=["text"])
    left, found = iter(table["text"].to_pylist()), {}
    for name, room in characters.items():
        found[name] = []
        while room > 0:
            found[name].append(next(left))
            room -= len(found[name][-1])
    return found


def code(characters: Mapping[str, int]) -> dict[str, list[str]]:
    """Sources, held out by package."""
    files = 400 if characters["teacher"] < 100_000 else 4000
    found = texts(Shares(package=100_000, excerpt=600, files=files, **characters))
    return {name: [CODE + text for text in part] for name, part in vars(found).items()}


def encoded(documents: list[str]) -> list[list[int]]:
    """Token ids of each document, with what begins and ends it."""
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    return [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in documents]


def write_recipe(folder: Path, scale: Scale, student: str, seed: int) -> Path:
    """The recipe of one student."""
    asked = [student] if student in DOMAINS else [*DOMAINS]
    route = {} if student == "unrouted" else WHERE
    teachers = [
        {"name": name, "model": str(folder / name)} | ({"where": route[name]} if route else {})
        for name in asked
    ]
    tree = {
        "run": {"dir": str(folder / "runs" / f"{student}-{seed}"), "seed": seed},
        "storage": {"dir": str(folder / "store")},
        "teachers": teachers,
        "student": {"config": dict(scale.student)},
        "data": {
            "source": str(folder / "texts.jsonl"),
            "format": "text",
            "window_tokens": scale.teacher.window,
            "holdout": 0,
        },
        "score": {"targets": "topk", "k": 32},
        "train": {
            "tokens": scale.tokens * len(asked),
            "tokens_per_step": 1024,
            "learning_rate": 4.0e-3,
        },
        "evaluate": {"baseline": student != "unrouted"},
    }
    path = folder / f"{student}-{seed}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def result(folder: Path, student: str, seed: int) -> Path:
    """Where a student's cross-entropies are."""
    return folder / "students" / f"{student}-{seed}.json"


def judge(folder: Path, scale: Scale, student: str, seed: int) -> None:
    """Train a student and its baseline and write their cross-entropies, unless they are there."""
    disable_progress_bar()
    file = result(folder, student, seed)
    if file.is_file():
        return
    with one_order():
        path = write_recipe(folder, scale, student, seed)
        done = run_arm(path, until="train", report=False)["train_dirs"]
    held_out = json.loads((folder / "held_out.json").read_text())
    found = {
        arm: {domain: cross_entropy(Path(run), held_out[domain]) for domain in DOMAINS}
        for arm, run in done.items()
    }
    print(f"{student}, seed {seed}: {json.dumps(found)}", flush=True)
    _write(file, found)


@torch.no_grad()
def cross_entropy(run: Path, documents: list[str]) -> float:
    """Nats a token of a run's student, over windows of some documents.

    Each document is read from its own beginning.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(run / "student").eval()
    total, tokens = 0.0, 0
    for ids in encoded(documents):
        for part in torch.tensor(ids).split(256):
            logprobs = model(input_ids=part[None]).logits[0, :-1].log_softmax(-1)
            total -= float(logprobs.gather(-1, part[1:, None]).sum())
            tokens += len(part) - 1
    return total / tokens


def study(folder: Path, scale: Scale, jobs: int) -> None:
    """All students; a seed is done before the next one begins."""
    (folder / "students").mkdir(parents=True, exist_ok=True)
    make_texts(folder, scale)
    run_arm(write_recipe(folder, scale, "unrouted", scale.seeds[0]), until="score", report=False)
    todo = [(folder, scale, student, seed) for seed in scale.seeds for student in STUDENTS]
    if jobs == 1:
        for one in todo:
            judge(*one)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        for done in [pool.submit(judge, *one) for one in todo]:
            done.result()


def compare(folder: Path, seeds: tuple[int, ...]) -> dict[str, Any]:
    """Gains of all students; of those of both, what they keep of each specialist's."""
    read = {
        (student, seed): json.loads(result(folder, student, seed).read_text())
        for student in STUDENTS
        for seed in seeds
    }

    def gain(student: str, seed: int, domain: str) -> float:
        baseline = read["routed" if student == "unrouted" else student, seed]["baseline"]
        return baseline[domain] - read[student, seed]["student"][domain]

    gains = {
        student: {domain: [gain(student, seed, domain) for seed in seeds] for domain in DOMAINS}
        for student in STUDENTS
    }
    kept = {
        student: {
            domain: [
                both / alone
                for both, alone in zip(gains[student][domain], gains[domain][domain], strict=True)
            ]
            for domain in DOMAINS
        }
        for student in ("routed", "unrouted")
    }
    entropies = [{"of": s, "seed": seed, **found} for (s, seed), found in read.items()]
    enough = all(interval(kept["routed"][domain])[0] >= KEPT for domain in DOMAINS)
    return {"gains": gains, "kept": kept, "cross_entropy": entropies, "keeps_enough": enough}


def main() -> None:
    """A table, then one JSON line."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--jobs", type=int, default=1, help="students that train at once")
    parser.add_argument("--tiny", action="store_true", help="seconds; shows nothing")
    words = parser.parse_args()
    folder, scale = words.folder.resolve(), SCALES["tiny" if words.tiny else "cpu"]
    study(folder, scale, words.jobs)
    outcome = compare(folder, scale.seeds)
    print(f"{'gain, nats/token':<20}" + "".join(f"{domain:>22}" for domain in DOMAINS))
    for student, of in outcome["gains"].items():
        print(f"{student:<20}" + "".join(f"{_shown(of[domain]):>22}" for domain in DOMAINS))
    for student, of in outcome["kept"].items():
        print(f"{'kept, ' + student:<20}" + "".join(f"{_shown(of[d]):>22}" for d in DOMAINS))
    line = json.dumps({"bench": "teachers", "results": outcome})
    (folder / "report.json").write_text(f"{line}\n")
    print(line)


def _write(file: Path, content: Mapping[str, Any]) -> None:
    """Write a file at once, so that a call that goes on sees all of it or nothing."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(content))
    part.replace(file)


def _shown(values: list[float]) -> str:
    mean, half = interval(values)
    return f"{mean:.4f}" + ("" if half is None else f" ± {half:.4f}")


if __name__ == "__main__":
    main()
