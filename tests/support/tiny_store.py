"""A small store to train from: random texts, scored by a tiny teacher with a plain forward pass."""

import json
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from stillroom.stages.recipe.fields import Arm
from stillroom.stages.recipe.sections import Recipe
from stillroom.stages.workers.job import Job, StopFlag
from stillroom.storage.keys import content_key
from stillroom.storage.snapshots.snapshot import Snapshot, make_snapshot, save_snapshot
from stillroom.storage.store.store import Store
from stillroom.storage.tables.soft_targets import SoftTargets

TEACHER = "teacher-of-the-tests"


class SilentProgress:
    """Remembers what a stage said."""

    def __init__(self) -> None:
        self.total, self.done, self.tokens = 0, 0, 0
        self.said: list[str] = []
        self.notes: list[str] = []

    def start(self, *, total: int, unit: str, done: int = 0) -> None:
        self.total, self.done = total, done

    def advance(self, units: int = 1, *, tokens: int = 0, note: str = "") -> None:
        self.done += units
        self.tokens += tokens
        self.notes.append(note)

    def others(self, units: int = 1) -> None:
        self.done += units

    def wrote(self, *, rejects: int, size: int) -> None:
        self.rejects, self.size = rejects, size

    def say(self, text: str) -> None:
        self.said.append(text)


class StopAfter(StopFlag):
    """Raises `Stopped` at the given look."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    def check(self) -> None:
        self.looks -= 1
        if self.looks <= 0:
            self.number = signal.SIGTERM
        super().check()


def random_texts(
    count: int, *, vocab: int = 24, shortest: int = 6, longest: int = 30, seed: int = 0
) -> list[list[int]]:
    """Token ids that start with <s> and end with </s>; a pattern in them can be learnt."""
    rng = np.random.default_rng(seed)
    texts = []
    for _ in range(count):
        length = int(rng.integers(shortest, longest + 1))
        start, stride = rng.integers(4, vocab), rng.integers(1, 3)
        body = (start - 4 + stride * np.arange(length - 2)) % (vocab - 4) + 4
        texts.append([1, *body.tolist(), 2])
    return texts


def in_spans(spans: Sequence[Sequence[int]]) -> list[int]:
    """Indices of the scored tokens."""
    return [index for start, tokens in spans for index in range(start, start + tokens)]


def teacher_targets(
    model: Any, ids: Sequence[int], scored: Sequence[int], k: int | None
) -> SoftTargets:
    """Targets of the tokens at some indices; k = None: full.

    Written here, not taken from the product.
    """
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, [index - 1 for index in scored]]
    logprobs = logits.double().log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    token = logprobs.gather(-1, torch.tensor(ids)[scored][:, None])[:, 0]
    kept, order = logprobs.sort(-1, descending=True)
    if k is None:
        entries, chosen, tail = logprobs, None, torch.full_like(token, -torch.inf)
    else:
        entries, chosen, tail = (
            kept[:, :k],
            order[:, :k].numpy().astype(np.int32),
            kept[:, k:].logsumexp(-1),
        )
    floats = [x.float().numpy() for x in (entries, tail, token, entropy)]
    return SoftTargets(
        ids=chosen,
        logprobs=floats[0],
        tail_logprob=floats[1],
        token_logprob=floats[2],
        entropy=floats[3],
    )


def make_store(
    root: Path,
    teacher: Path,
    *,
    texts: list[list[int]],
    k: int | None = 6,
    prompt_tokens: int = 2,
    spans: Mapping[int, list[list[int]]] | None = None,
) -> Store:
    """A store with `soft_targets` and `generations` of the texts, eight rows to a shard.

    `spans`: of the texts with these numbers, what is scored; of the others all after the prompt.
    """
    from stillroom.storage.store.store import CommitLimits

    store = Store.open(root, create=True)
    files = {f.name: f.read_bytes() for f in teacher.iterdir() if f.suffix == ".json"}
    store.put_teacher(TEACHER, files | {"identity.json": json.dumps({"model": TEACHER}).encode()})
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    vocab = model.config.vocab_size
    about = {
        "teacher_id": TEACHER,
        "tokenizer_id": "words",
        "vocab_size": vocab,
        "mantissa_bits": 23,
        "head": "lm",
    }
    with (
        store.writer("soft_targets", about=about, limits=CommitLimits(rows=8)) as targets,
        store.writer("generations", about=about, limits=CommitLimits(rows=8)) as generations,
    ):
        for number, ids in enumerate(texts):
            key = content_key("text", number=number, ids=ids)
            common = {
                "key": key,
                "reuse_key": key,
                "prompt_key": key,
                "tokens_key": key,
                "token_ids": ids,
            }
            of_text = (spans or {}).get(number) or [[prompt_tokens, len(ids) - prompt_tokens]]
            columns = teacher_targets(model, ids, in_spans(of_text), k).columns(23)
            flat = [n for span in of_text for n in span] if len(of_text) > 1 else None
            kind = {
                "kind": "full" if k is None else "topk",
                "generation_key": key,
                "teacher_id": TEACHER,
            }
            common |= {"spans": flat}
            targets.add(common | columns | kind | {"span_start": of_text[0][0], "label": None})
            generations.add(
                common
                | {
                    "author_id": TEACHER,
                    "sampling_id": TEACHER,
                    "sample_index": 0,
                    "prompt_tokens": prompt_tokens,
                    "text": "",
                }
                | {"completion_tokens": len(ids) - prompt_tokens, "finish_reason": "stop"}
            )
    return store


def snapshot_of(store: Store, table: str = "soft_targets", rows: slice = slice(None)) -> Snapshot:
    """A kept snapshot of some rows of a table, in commit order."""
    index = store.index(table, ["key"])
    places: dict[str, list[int]] = {}
    pairs = list(zip(index["shard"].to_pylist(), index["row"].to_pylist(), strict=True))
    for shard, row in pairs[rows]:
        places.setdefault(shard, []).append(row)
    snapshot = make_snapshot(store, table, places, {})
    save_snapshot(store, snapshot)
    return snapshot


def make_recipe(store: Store, teacher: Path, **sections: Mapping[str, Any] | None) -> Recipe:
    """A recipe that trains from a store; a section given here is laid over the defaults below."""
    content: dict[str, Any] = {
        "run": {"dir": "unused"},
        "storage": {"dir": str(store.root)},
        "teacher": {"model": str(teacher)},
        "student": {"config": {"num_hidden_layers": 1}},
        "data": {"source": "unused", "format": "text"},
        "score": {"k": 6},
        "train": {
            "tokens": 1200,
            "tokens_per_step": 100,
            "tokens_per_pass": 60,
            "learning_rate": 1e-2,
        },
    }
    replaced = {"student"}
    for name, section in sections.items():
        content[name] = (
            section
            if section is None or name in replaced
            else content.get(name, {}) | dict(section)
        )
    return Recipe(**content)


def make_job(
    recipe: Recipe,
    folder: Path,
    *,
    arm: Arm = "student",
    stop: StopFlag | None = None,
    **snapshots: str,
) -> Job:
    """A training job into a folder."""
    return Job(
        recipe=recipe,
        progress=SilentProgress(),
        stop=stop or StopFlag(),
        teacher_id=TEACHER,
        author_id=TEACHER,
        arm=arm,
        train_dirs={arm: folder},
        snapshots=snapshots,  # type: ignore[arg-type]
    )
