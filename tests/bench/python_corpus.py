"""Text that every machine with Python has: the sources of installed packages.

They are held out by package, and come with a tokenizer.

Files come in the order of their hashes, so the corpus is a function of what is installed. A file is
dropped where most of its long lines were seen in files before it (copies, generated code, vendored
packages). Held-out packages share no file with the others. The student's texts are excerpts of
files that the teacher is not trained on.
"""

import json
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

END = "<|end|>"
"""Between documents, and the tokenizer's only special token."""
HELD_OUT_PACKAGES = 0.1
ENCODED_AT_ONCE = 1000  # documents; encodings take many times the text's memory
LONG_LINE = 30
"""Characters from which a line says where it is from."""


@dataclass(frozen=True, kw_only=True)
class Shares:
    """How much text, in characters, who gets."""

    package: int
    """At most this much of one package, so that none is most of the corpus."""
    teacher: int
    student: int
    held_out: int
    excerpt: int
    """The student's and the held-out documents are excerpts of about this length."""
    files: int | None = None
    """Look at so many files at most, in the order of the hashes of their paths."""


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Three parts that share no document."""

    teacher: list[str]
    student: list[str]
    held_out: list[str]


def texts(shares: Shares) -> Texts:
    """The corpus; what the student sees and what is held out are excerpts.

    Raises:
        SystemExit: this interpreter's packages hold too little.
    """
    parts: dict[str, list[str]] = {"teacher": [], "student": [], "held_out": []}
    filled = dict.fromkeys(parts, 0)
    limits = {name: getattr(shares, name) for name in parts}
    for package, text in _documents(shares):
        name = "held_out" if _fraction(package) < HELD_OUT_PACKAGES else "student"
        if name == "student" and filled["student"] >= limits["student"]:
            name = "teacher"
        if filled[name] < limits[name]:
            parts[name].append(text if name == "teacher" else excerpt(text, shares.excerpt))
            filled[name] += len(parts[name][-1])
        if all(filled[part] >= limits[part] for part in parts):
            break
    if short := [name for name in parts if filled[name] < limits[name] * 0.9]:
        print(
            (
                "less text than asked for: "
                f"{', '.join(f'{n} {filled[n]} of {limits[n]}' for n in short)}"
            ),
            flush=True,
        )
    if not all(parts.values()):
        raise SystemExit(
            "the packages of this interpreter hold too little Python. Install more of them."
        )
    return Texts(**parts)


def excerpt(text: str, characters: int) -> str:
    """Whole lines from a place that the text's hash decides, about so many characters.

    All of a short text.
    """
    if len(text) <= characters:
        return text
    lines = text.splitlines(keepends=True)
    starts = np.cumsum([0, *map(len, lines)])
    last = int(np.searchsorted(starts, len(text) - characters))
    first = int(_fraction(text) * (last + 1))
    stop = max(first + 1, int(np.searchsorted(starts, starts[first] + characters)))
    return "".join(lines[first:stop])[: 2 * characters]


def train_tokenizer(
    documents: list[str], folder: Path, *, vocab_size: int, characters: int = 6_000_000
) -> None:
    """A byte-level BPE of these documents, saved as transformers loads it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_up_to(documents, characters), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(folder)


def write_documents(path: Path, documents: list[str]) -> None:
    """One JSON object per line, as `data.format: text` reads it."""
    path.write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8"
    )


def write_corpus(folder: Path, shares: Shares, *, vocab_size: int) -> None:
    """Write the student's and the held-out texts into `folder`.

    The teacher's token ids and the tokenizer go there too.
    """
    from tokenizers import Tokenizer

    found = texts(shares)
    train_tokenizer(found.teacher, folder / "teacher", vocab_size=vocab_size)
    tokenizer = Tokenizer.from_file(str(folder / "teacher" / "tokenizer.json"))
    end = tokenizer.token_to_id(END)
    ids = [
        np.array([*encoded.ids, end], np.uint16)
        for start in range(0, len(found.teacher), ENCODED_AT_ONCE)
        for encoded in tokenizer.encode_batch(found.teacher[start : start + ENCODED_AT_ONCE])
    ]
    np.save(folder / "teacher.npy", np.concatenate(ids))
    write_documents(folder / "held_out.jsonl", found.held_out)
    write_documents(folder / "student.jsonl", found.student)
    about = {
        "documents": {name: len(part) for name, part in vars(found).items()},
        "shares": asdict(shares),
    }
    about["teacher_tokens"] = sum(map(len, ids))
    (folder / "corpus.json").write_text(json.dumps(about))


def _documents(shares: Shares) -> Iterator[tuple[str, str]]:
    """(package, text) of every file that is worth reading, in the order of the texts' hashes."""
    root = Path(sysconfig.get_paths()["purelib"])
    paths = {_fraction(str(path.relative_to(root))): path for path in root.rglob("*.py")}
    files = {}
    for path in [paths[place] for place in sorted(paths)[: shares.files]]:
        if 500 <= path.stat().st_size <= 100_000:
            text = path.read_text(encoding="utf-8", errors="ignore").replace("\r\n", "\n")
            files[sha256(text.encode()).digest()] = (path.relative_to(root).parts[0], text)
    taken, seen = defaultdict[str, int](int), set[int]()
    for digest in sorted(files):
        package, text = files[digest]
        lines = text.splitlines()
        if (
            taken[package] >= shares.package or max(map(len, lines)) > 400
        ):  # the latter is data more than code
            continue
        marks = {hash(line) for line in map(str.strip, lines) if len(line) >= LONG_LINE}
        if len(marks & seen) <= len(marks) / 2:
            taken[package] += len(text)
            yield package, text
        seen |= marks


def _fraction(name: str) -> float:
    """A number in [0, 1) that only the name decides."""
    return int.from_bytes(sha256(name.encode()).digest()[-6:], "big") / 2**48


def _up_to(documents: list[str], characters: int) -> Iterator[str]:
    given = 0
    for text in documents:
        if given >= characters:
            return
        given += len(text)
        yield text
