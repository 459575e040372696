"""Token classification: what Python's own `tokenize` says of each piece of its source.

There are a teacher and small students.

    python tests/bench/token_types.py DIR [--seeds 0,1,2] [--tiny]

Words are pieces of the source files of installed packages: runs of letters and digits, and each
other sign. The tag of one is the type of the token that it stands in, B- where that begins and I-
where it goes on: so what stands in a string or a comment is told by what stands around it. Rows are
of lines that follow one another; packages, not rows, are split into what the teacher learns, what
students learn (some of it), what chooses learning rates, and what judges, which is read once.

A BERT is trained on the tags of all training packages, on the spot. Students learn from a part of
these rows: from their tags alone, and from the teacher's distributions as well. Each has the
learning rate whose cross-entropy on validation packages is best at the first seed. The last line is
JSON.
"""

import io
import json
import re
import sysconfig
import tokenize
from argparse import ArgumentParser
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import yaml
from arms import run_arm
from torch.nn import functional
from transformers import BertConfig, BertForTokenClassification, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from stillroom.pipeline.report.seeds import interval

KINDS = ("NAME", "OP", "NUMBER", "STRING", "COMMENT")
TAGS = ("O", *(f"{mark}-{kind}" for kind in KINDS for mark in "BI"))
PIECE = re.compile(r"\w+|[^\w\s]")
PARTS = {"test": 0.15, "validation": 0.25, "train": 1.0}
"""Part -> the share of packages up to which it goes, in the order of the hashes of their names."""
ARMS = {"labels alone": "baseline", "distilled": "student"}
MEASURES = ("accuracy", "f1_macro", "entity_f1", "cross_entropy", "kl_teacher")

Row = dict[str, list[str]]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes of everything."""

    files: int = 2500
    """Looked at, in the order of the hashes of their names."""
    rows: int = 6000
    """Of the teacher's training."""
    student_rows: int = 1000
    judged: int = 600
    """Rows of validation and of test, each."""
    pieces: int = 48
    """Of a row, about."""
    vocabulary: int = 2000
    hidden: int = 96
    layers: int = 3
    teacher_epochs: int = 6
    student_hidden: int = 32
    epochs: int = 6
    rates: tuple[float, ...] = (1e-3, 3e-3, 9e-3, 27e-3, 81e-3)


SCALES = {
    "cpu": Scale(),
    "tiny": Scale(
        files=60,
        rows=60,
        student_rows=30,
        judged=16,
        vocabulary=300,
        hidden=16,
        layers=1,
        teacher_epochs=1,
        student_hidden=8,
        epochs=1,
        rates=(3e-3,),
    ),
}


def tagged(source: str, pieces: int) -> Iterator[Row]:
    """The rows of a file: whole lines, until they have so many pieces."""
    kinds = _kinds(source)
    words: list[str] = []
    tags: list[str] = []
    for number, line in enumerate(source.splitlines(), 1):
        for match in PIECE.finditer(line):
            kind, begins = kinds.get((number, match.start()), ("O", False))
            words.append(match[0])
            tags.append(kind if kind == "O" else f"{'B' if begins else 'I'}-{kind}")
        if len(words) >= pieces:
            yield {"words": words[: 2 * pieces], "labels": tags[: 2 * pieces]}
            words, tags = [], []


def _kinds(source: str) -> dict[tuple[int, int], tuple[str, bool]]:
    """Line and column -> the kind of the token there, and whether it begins there."""
    lines = source.splitlines()
    found: dict[tuple[int, int], tuple[str, bool]] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        name = tokenize.tok_name[token.type]
        kind = "STRING" if name.startswith("FSTRING") else name
        if kind not in KINDS:
            continue
        (first, start), (last, end) = token.start, token.end
        for number in range(first, last + 1):
            begin = start if number == first else 0
            stop = end if number == last else len(lines[number - 1])
            found |= {
                (number, at): (kind, (number, at) == (first, start)) for at in range(begin, stop)
            }
    return found


def rows(scale: Scale) -> dict[str, list[Row]]:
    """Part -> rows; no package is in two parts."""
    root = Path(sysconfig.get_paths()["purelib"])
    paths = sorted(root.rglob("*.py"), key=lambda path: _fraction(str(path.relative_to(root))))
    wanted = {"train": scale.rows, "validation": scale.judged, "test": scale.judged}
    found: dict[str, list[Row]] = defaultdict(list)
    for path in paths[: scale.files]:
        place = _fraction(path.relative_to(root).parts[0])
        part = next(name for name, share in PARTS.items() if place < share)
        if len(found[part]) >= wanted[part] or path.stat().st_size > 100_000:
            continue
        try:
            found[part] += list(tagged(path.read_text("utf-8"), scale.pieces))[:20]
        except (SyntaxError, UnicodeDecodeError, IndentationError, tokenize.TokenError):
            continue
    if lacking := [part for part in wanted if len(found[part]) < wanted[part] / 2]:
        raise SystemExit(f"too little Python for {', '.join(lacking)}. Install more packages.")
    return {part: found[part][: wanted[part]] for part in wanted}


def _fraction(name: str) -> float:
    """A number in [0, 1) that only the name decides."""
    return int.from_bytes(sha256(name.encode()).digest()[-6:], "big") / 2**48


def train_teacher(folder: Path, train: list[Row], scale: Scale) -> None:
    """A BERT trained on the tags of these rows, and a tokenizer of their words; saved."""
    torch.manual_seed(0)
    tokenizer = _tokenizer(train, scale.vocabulary)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=scale.hidden,
        num_hidden_layers=scale.layers,
        num_attention_heads=4,
        intermediate_size=4 * scale.hidden,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        id2label=dict(enumerate(TAGS)),
        label2id={tag: index for index, tag in enumerate(TAGS)},
    )
    model = BertForTokenClassification(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rng = np.random.default_rng(0)
    for epoch in range(scale.teacher_epochs):
        for part in np.array_split(rng.permutation(len(train)), max(1, len(train) // 16)):
            loss = _loss(model, tokenizer, [train[index] for index in part])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"teacher: epoch {epoch + 1}, loss {float(loss):.3f}", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _loss(model: Any, tokenizer: Any, part: list[Row]) -> torch.Tensor:
    """Cross-entropy at the first token of each word."""
    texts = [row["words"] for row in part]
    made = tokenizer(
        texts, is_split_into_words=True, padding=True, truncation=True, return_tensors="pt"
    )
    labels = torch.full(made["input_ids"].shape, -100)
    for number, row in enumerate(part):
        seen: set[int] = set()
        for place, word in enumerate(made.word_ids(number)):
            if word is not None and word not in seen:
                labels[number, place] = TAGS.index(row["labels"][word])
                seen.add(word)
    return functional.cross_entropy(model(**made).logits.transpose(1, 2), labels)


def _tokenizer(train: list[Row], size: int) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=special, show_progress=False
    )
    made.train_from_iterator((" ".join(row["words"]) for row in train), trainer)
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {f"{name.strip('[]').lower()}_token": name for name in special}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=512, **names)


class Bench:
    """The folder of a run."""

    task, format, measures = "token_classification", "tagged", MEASURES
    asked: ClassVar[dict[str, Any]] = {
        "score": {"targets": "full"},
        "loss": {"temperature": 2.0, "soft_weight": 0.5, "hard_weight": 0.5},
    }
    """Of the teacher and of the students."""
    ending, tokens_per_step = "jsonl", 1024
    """Of the files of rows; of training."""

    def __init__(self, folder: Path, scale: Any) -> None:
        self.folder, self.scale = folder, scale
        folder.mkdir(parents=True, exist_ok=True)

    def prepare(self) -> None:
        """Rows and teacher, unless they are there."""
        if (self.folder / "teacher" / "model.safetensors").is_file():
            return
        found = rows(self.scale)
        parts = found | {"student": found["train"][: self.scale.student_rows]}
        for name, some in parts.items():
            lines = "".join(json.dumps(row) + "\n" for row in some)
            (self.folder / f"{name}.jsonl").write_text(lines)
        train_teacher(self.folder / "teacher", found["train"], self.scale)

    @property
    def student(self) -> dict[str, Any]:
        """Its config, beside the teacher's."""
        size = self.scale.student_hidden
        return {"hidden_size": size, "intermediate_size": 4 * size, "num_hidden_layers": 2}

    def run(self, rate: float, seed: int, *, judged: str) -> dict[str, Any]:
        """Both students at one rate; their numbers on the rows of a part."""
        recipe = self.asked | {
            "run": {
                "dir": str(self.folder / "runs" / f"{judged}-{rate:g}-{seed}"),
                "task": self.task,
                "seed": seed,
            },
            "storage": {"dir": str(self.folder / f"store-{judged}")},
            "teacher": {"model": str(self.folder / "teacher")},
            "student": {"config": self.student},
            "data": {"source": str(self.folder / f"student.{self.ending}"), "format": self.format},
            "train": {
                "epochs": self.scale.epochs,
                "tokens_per_step": self.tokens_per_step,
                "learning_rate": rate,
            },
            "evaluate": {"source": str(self.folder / f"{judged}.{self.ending}"), "baseline": True},
        }
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        found: dict[str, Any] = run_arm(path, report=False)["results"]
        return found

    def compare(self, seeds: tuple[int, ...]) -> dict[str, Any]:
        """Each arm at its best rate on validation rows.

        The test rows are read after that is chosen.
        """
        tried = {rate: self.run(rate, seeds[0], judged="validation") for rate in self.scale.rates}
        found: dict[str, Any] = {"rates": {}, "results": {}}
        for words, arm in ARMS.items():
            nats = {rate: tried[rate][arm]["cross_entropy"] for rate in tried}
            found["rates"][words] = min(nats, key=lambda rate: nats[rate])
        for words, arm in ARMS.items():
            rate = found["rates"][words]
            results = [self.run(rate, seed, judged="test") for seed in seeds]
            found["results"][words] = self._over_seeds([result[arm] for result in results])
            found["results"]["teacher"] = self._over_seeds([results[0]["teacher"]])
        return found

    def _over_seeds(self, results: list[dict[str, Any]]) -> dict[str, Any]:
        return {name: interval([result[name] for result in results]) for name in self.measures}


def compare_arms(kind: type[Bench], scales: Mapping[str, Any], about: str | None) -> None:
    """The command line of such a comparison; the last line is JSON."""
    parser = ArgumentParser(description=about)
    parser.add_argument("dir", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    disable_progress_bar()
    seeds = tuple(map(int, options.seeds.split(",")))
    bench = kind(options.dir, scales["tiny" if options.tiny else "cpu"])
    bench.prepare()
    found = bench.compare(seeds)
    print(f"{'':<14}" + "".join(f"{name:>22}" for name in kind.measures))
    for words, numbers in found["results"].items():
        cells = (
            f"{mean:.4f}" + ("" if half is None else f" ± {half:.4f}")
            for mean, half in numbers.values()
        )
        print(f"{words:<14}" + "".join(f"{cell:>22}" for cell in cells))
    print(json.dumps(found))


if __name__ == "__main__":
    compare_arms(Bench, SCALES, __doc__)
