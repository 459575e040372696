"""Bytes per token against what a student's loss gets wrong, for every kind of target.

It is measured on a real teacher's answers.

    python tests/bench/rate_distortion.py DIR [--tiny]

The bench trains a teacher and a smaller student on TinyStories and WikiText-2 with GPT-2's
tokenizer (a quarter of an hour on two cores; kept in DIR, so a second call goes on), scores
held-out text, writes every kind and setting with the store's own writer, reads it back and measures
the files and `distortion.py`'s errors. DIR/rate-distortion.svg is the plot. The last line is JSON.
"""

import json
import pickle
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from curves import plot, verdicts
from distortion import (
    WIDEST,
    Entries,
    Row,
    above,
    above_p,
    best_k,
    entries,
    gradients,
    kl_error,
    scored,
    sparse_form,
    squared_error,
)
from small_models import Size, SmallModel, cross_entropy, texts, train, windows

from stillroom.storage.keys import content_key
from stillroom.storage.store.store import Store
from stillroom.storage.tables.soft_targets import SoftTargets

VOCABULARY = 50_257
TEACHER = Size(hidden=144, layers=3, steps=520, learning_rate=4e-3)
STUDENT = Size(hidden=64, layers=2, steps=90, learning_rate=4e-3)
ROWS, SMALL_BATCH = 96, 16
"""Rows of 255 scored tokens; those of the smaller batch for gradients."""
K = (8, 16, 32, 50, 128, 256)
P = (0.4, 0.6, 0.8, 0.9)
ROUNDS = (4, 8, 13, 25, 50)
ABOVE = (0.02, 0.005, 0.002, 0.001, 0.0005)
BITS = (10, 7, 6, 5, 4)


@dataclass
class Point:
    """A setting at so many bits: what it costs and what it gets wrong."""

    family: str
    """Kind, or way of drawing."""
    setting: str
    bits: int
    entries: float
    """Per token, mean."""
    kept_mass: float | None
    squared_error: float
    """Mean over tokens."""
    kl_bias: float
    """Mean over tokens of the error of KL, nats."""
    kl_rms: dict[str, float]
    """Root mean square error of a batch's mean KL, nats, by tokens in the batch: bias and spread of
    the tokens."""
    bytes: float = 0.0
    """Per scored token, of the whole files."""
    columns: dict[str, float] = field(default_factory=dict)
    """The same by column, from 0.01 on; what is missing to `bytes` are small columns, footers and
    indexes."""
    gradient: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Angle to the full gradient in degrees, and ratio of lengths, by tokens in the batch."""

    @property
    def name(self) -> str:
        """Family, bits and setting."""
        return f"{self.family} {self.setting} {self.bits} bits"

    @classmethod
    def of(cls, setting: "Setting", bits: int, *, rows: list[Row], seen: list[Entries]) -> "Point":
        """What is wrong with the entries that were read back."""
        wrong = np.concatenate([kl_error(row, e) for row, e in zip(rows, seen, strict=True)])
        tails = [1 - e.tail for e in seen if e.tail is not None]
        return cls(
            family=setting.family,
            setting=setting.name,
            bits=bits,
            entries=float(np.mean([(e.truth > 0).sum(axis=1).mean() for e in seen])),
            kept_mass=float(np.mean(tails)) if tails else None,
            squared_error=float(
                np.mean([squared_error(row, e) for row, e in zip(rows, seen, strict=True)])
            ),
            kl_bias=float(wrong.mean()),
            kl_rms={
                str(n): float(np.hypot(wrong.mean(), wrong.std() / np.sqrt(n)))
                for n in (1, 4096, 32768)
            },
        )


def models(
    folder: Path, *, tiny: bool
) -> tuple[SmallModel, SmallModel, dict[str, float], list[torch.Tensor]]:
    """Teacher, student, the teacher's perplexity by source, and the rows to score.

    Half of the rows are of each source.
    """
    if tiny:
        size = Size(hidden=32, layers=1, steps=0, learning_rate=0.0, window=32)
        torch.manual_seed(0)
        ids = torch.randint(2000, (4, 33))
        teacher, student = SmallModel(2000, size).eval(), SmallModel(2000, size).eval()
        teacher.bias.data = torch.randn(2000) * 3
        return teacher, student, {}, list(ids)
    data, held_out = texts()
    made = []
    for name, size, seed in (("teacher", TEACHER, 0), ("student", STUDENT, 1)):
        path = folder / f"{name}.pt"
        if path.is_file():
            model = SmallModel(VOCABULARY, size)
            model.load_state_dict(torch.load(path))
        else:
            print(f"training the {name}: {size}", flush=True)
            model = train(size, data, VOCABULARY, seed=seed)
            torch.save(model.state_dict(), path)
        made.append(model.eval())
    window = TEACHER.window
    perplexity = {
        f"{who} on {source}": float(np.exp(cross_entropy(model, ids, window=window, limit=10_000)))
        for who, model in zip(("teacher", "student"), made, strict=True)
        for source, ids in held_out.items()
    }
    parts = [windows(ids, window - 1)[: ROWS // 2] for ids in held_out.values()]
    return made[0], made[1], perplexity, [row for pair in zip(*parts, strict=True) for row in pair]


@dataclass(frozen=True)
class Setting:
    """One way of storing targets."""

    family: str
    kind: str
    name: str
    bits: tuple[int, ...]
    make: Callable[[Row], SoftTargets]
    truth: str
    """Where a row keeps what both models say about the entries."""
    columns: dict[str, Any]


def settings() -> Iterator[Setting]:
    """Every setting."""
    for k in K:
        yield Setting("topk", "topk", f"K={k}", BITS, partial(best_k, k=k), "best", {})
    for p in P:
        columns = {"p": p, "k_min": 1, "k": WIDEST}
        yield Setting("topp", "topp", f"p={p}", (10, 7), partial(above_p, p=p), "best", columns)
    for least in ABOVE:
        columns = {"p": 1.0, "k_min": 1, "k": WIDEST}  # the ragged layout; no kind of its own
        make = partial(above, least=least)
        yield Setting("threshold", "topp", f"t={least}", (10, 6, 5, 4), make, "best", columns)
    for draw in ("multinomial", "systematic"):
        for rounds in ROUNDS:
            name, columns = f"{draw} {rounds}", {"draw": draw, "proposal": 1.0, "k": rounds}
            yield Setting(
                draw,
                "sampled",
                f"N={rounds}",
                (10, 7),
                lambda row, name=name: row.drawn[name],
                name,
                columns,
            )


def stored(
    rows: list[Row], made: list[SoftTargets], setting: Setting, bits: int
) -> tuple[float, dict[str, float], list[SoftTargets]]:
    """Write one setting's rows as the store does, and read them.

    The bytes/token, the same by column, and the targets are returned.
    """
    about = {
        "teacher_id": "t",
        "tokenizer_id": "gpt2",
        "vocab_size": VOCABULARY,
        "mantissa_bits": bits,
        "head": "lm",
    }
    with TemporaryDirectory() as folder:
        store = Store.open(Path(folder) / "store", create=True)
        with store.writer("soft_targets", about=about) as writer:
            for number, (row, targets) in enumerate(zip(rows, made, strict=True)):
                key = content_key("row", number=number)
                names = dict.fromkeys(
                    ("key", "reuse_key", "tokens_key", "generation_key", "prompt_key"), key
                )
                names |= {
                    "teacher_id": "t",
                    "kind": setting.kind,
                    "token_ids": row.token_ids,
                    "span_start": 1,
                }
                writer.add(names | targets.columns(bits) | setting.columns)
        commits = store.commits("soft_targets")
        tokens, columns = sum(commit.tokens for commit in commits), Counter[str]()
        for commit in commits:
            columns.update(store.shard("soft_targets", commit.shard.sha256).column_bytes())
        places = {commit.shard.sha256: range(commit.shard.rows) for commit in commits}
        back = [SoftTargets.from_row(row) for row in store.rows("soft_targets", places)]
    size = sum(commit.shard.bytes for commit in commits)
    return (
        size / tokens,
        {name: round(x / tokens, 3) for name, x in columns.most_common() if x >= tokens / 100},
        back,
    )


def measure(folder: Path, *, tiny: bool) -> dict[str, Any]:
    """All points, and what the models are."""
    teacher, student, perplexity, windows_of_text = models(folder, tiny=tiny)
    draws = {s.truth: (s.family, s.columns["k"]) for s in settings() if s.kind == "sampled"}
    rows = pickle.loads(kept.read_bytes()) if (kept := folder / "rows.pickle").is_file() else []
    for number, ids in enumerate(windows_of_text[len(rows) :], len(rows)):
        rows.append(scored(teacher, student, ids, number=number, draws=draws))
        if number % 16 == 15:
            print(f"scored {number + 1} of {len(windows_of_text)} rows", flush=True)
            kept.write_bytes(pickle.dumps(rows))
    points, forms = [], {}
    for setting in settings():
        made = [setting.make(row) for row in rows]
        for bits in setting.bits:
            size, columns, back = stored(rows, made, setting, bits)
            seen = [
                entries(row, setting.truth, targets)
                for row, targets in zip(rows, back, strict=True)
            ]
            point = Point.of(setting, bits, rows=rows, seen=seen)
            point.bytes, point.columns = size, columns
            points.append(point)
            print(
                f"{point.family:<12} {setting.name:<7} {bits:>2} bits {size:8.2f} bytes/token",
                flush=True,
            )
            if bits == 10 or setting.name == "K=50":
                forms[point.name] = [(e.ids, *sparse_form(e, drop_tail=False)) for e in seen]
            if bits == 10 and setting.name in ("K=50", "K=128"):
                forms[f"{point.name}, tail dropped"] = [
                    (e.ids, *sparse_form(e, drop_tail=True)) for e in seen
                ]
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for batch in (SMALL_BATCH, len(rows)):
        tokens = str(sum(len(row.kl) for row in rows[:batch]))
        print(f"gradients over {tokens} tokens", flush=True)
        of_batch = {name: form[:batch] for name, form in forms.items()}
        for name, value in gradients((teacher, student), rows[:batch], of_batch).items():
            found.setdefault(name, {})[tokens] = value
    for point in points:
        point.gradient = found.get(point.name, {})
    dropped = {name: value for name, value in found.items() if name.endswith("dropped")}
    about = {
        "tokens": sum(len(row.kl) for row in rows),
        "perplexity": perplexity,
        "kl": float(_mean(rows, "kl")),
    }
    about["entropy"] = float(np.mean([row.best.entropy.mean() for row in rows]))
    return {"about": about, "points": [asdict(point) for point in points], "tail_dropped": dropped}


def _mean(rows: list[Row], name: str) -> np.floating[Any]:
    return np.concatenate([getattr(row, name) for row in rows]).mean()


def main() -> None:
    """Parse the command line, measure, show."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="random models and a few tokens, in seconds; shows nothing",
    )
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    result = measure(arguments.folder, tiny=arguments.tiny)
    lines, result["verdicts"] = verdicts(result["points"], result["tail_dropped"])
    print("\n".join(lines))
    (arguments.folder / "rate-distortion.svg").write_text(plot(result["points"]))
    print(json.dumps({"bench": "rate_distortion", **result}))


if __name__ == "__main__":
    main()
