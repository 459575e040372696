"""The limits of size.

It shows what each costs in memory, how it ends, and whether it leaves files open or behind.

    python tests/bench/sizes.py [--only NAME ...] [--tiny]

Each size is one or more commands, their stages too, in one process forked for it, with a tiny
model, after a small one of the same has been done there, so that what libraries load and open once
is not counted. Peak memory is that of the whole process, libraries included; added is what it grew
beyond the small one. File descriptors are counted before and after, and files in TMPDIR and
temporary ones in the store after. It prints a table, then one line of JSON.
"""

import argparse
import csv
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import cycle, islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ["OMP_NUM_THREADS"] = os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import pyarrow as pa
import pyarrow.parquet as pq
from forked import fork
from kit import prompts, stillroom, write_jsonl, write_recipe
from tiny_llama import WORDS, save_tiny_llama

MOST_MB = 2048
"""Memory that a size may add."""
MOST_SECONDS = 600
"""After which a size is ended: it hangs."""
SMALL = 0.001
"""The share of the size that is done first."""
FIGURES = ("peak_mb", "added_mb", "cpu_seconds", "descriptors", "files")
Command = tuple[str | Path, ...]


def text(folder: Path, share: float) -> Iterator[Command]:
    """One record of 50 MB, cut into windows, among small ones."""
    words = " ".join(islice(cycle(WORDS), 200)) + " "
    records = [
        {"text": words * max(1, int(50e6 * share / len(words)))},
        *({"text": row["prompt"]} for row in prompts(8)),
    ]
    source = write_jsonl(folder / "text.jsonl", records)
    data = {"source": str(source), "format": "text", "window_tokens": 128, "holdout": 4}
    recipe = write_recipe(folder, _teacher(folder), source, data=data, generate=None)
    yield "run", recipe, "--until", "data"


def many_prompts(folder: Path, share: float) -> Iterator[Command]:
    """100,000 prompts, read and planned."""
    rows = [{"prompt": f"{p['prompt']} {n}"} for n, p in enumerate(prompts(int(100_000 * share)))]
    recipe = write_recipe(folder, _teacher(folder), write_jsonl(folder / "prompts.jsonl", rows))
    yield "run", recipe, "--until", "data"
    yield "plan", recipe


def vocabulary(folder: Path, share: float) -> Iterator[Command]:
    """262,144 ids: scored, trained a few steps, judged."""
    teacher = _teacher(folder, vocab_size=max(32, int(262_144 * share)))
    recipe = write_recipe(folder, teacher, write_jsonl(folder / "prompts.jsonl", prompts(12)))
    yield "run", recipe


def every_id(folder: Path, share: float) -> Iterator[Command]:
    """K is the vocabulary, as entries."""
    yield from _kept(folder, share, k="all of them")


def full(folder: Path, share: float) -> Iterator[Command]:
    """K is the vocabulary, as full targets."""
    yield from _kept(folder, share, k=None)


def long_string(folder: Path, share: float) -> Iterator[Command]:
    """A recipe of which one name is 1 MB long."""
    yield from _padded(folder, "name: " + "x" * int(1e6 * share))


def many_fields(folder: Path, share: float) -> Iterator[Command]:
    """A recipe of 1 MB of fields."""
    yield from _padded(folder, "".join(f"field_{n:05}: {n}\n" for n in range(int(55_000 * share))))


def comments(folder: Path, share: float) -> Iterator[Command]:
    """A recipe of 1 MB of comments."""
    yield from _padded(folder, "# a remark\n" * int(90_000 * share))


def parquet_columns(folder: Path, share: float) -> Iterator[Command]:
    """A Parquet source with 5,000 columns."""
    rows = prompts(12)
    more = {f"column_{n}": [n] * len(rows) for n in range(int(5000 * share))}
    table = pa.table({"prompt": [row["prompt"] for row in rows]} | more)
    pq.write_table(table, folder / "wide.parquet")
    yield from _read(folder, folder / "wide.parquet")


def csv_columns(folder: Path, share: float) -> Iterator[Command]:
    """A CSV source with 5,000 columns."""
    more = {f"column_{n}": n for n in range(int(5000 * share))}
    with (folder / "wide.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", *more])
        writer.writeheader()
        writer.writerows(row | more for row in prompts(12))
    yield from _read(folder, folder / "wide.csv")


def imported_columns(folder: Path, share: float) -> Iterator[Command]:
    """A foreign table with 5,000 columns."""
    rows, k = 8, 4
    tokens = [[1, 4 + n, 5, 6, 7, 8] for n in range(rows)]
    columns: dict[str, Any] = {
        "token_ids": tokens,
        "teacher_topk_ids": [[list(range(k))] * 6] * rows,
        "teacher_topk_logprobs": [[[-1.5, -1.6, -1.7, -1.8]] * 6] * rows,
    }
    columns |= {f"column_{n}": [n] * rows for n in range(int(5000 * share))}
    pq.write_table(pa.table(columns), folder / "wide.parquet")
    teacher = ("--teacher", _teacher(folder), "--targets-at", "next")
    yield "import", folder / "wide.parquet", folder / "store", *teacher


def _teacher(folder: Path, **config: Any) -> Path:
    return save_tiny_llama(folder / "teacher", hidden_size=8, num_attention_heads=1, **config)


def _kept(folder: Path, share: float, *, k: str | None) -> Iterator[Command]:
    """A vocabulary of 32,768, every id of which is kept at each token."""
    ids = max(32, int(32_768 * share))
    teacher = _teacher(folder, vocab_size=ids)
    source = write_jsonl(folder / "prompts.jsonl", prompts(12))
    score = {"batch_tokens": 256, **({"targets": "full"} if k is None else {"k": ids})}
    yield "run", write_recipe(folder, teacher, source, score=score)


def _padded(folder: Path, more: str) -> Iterator[Command]:
    source = write_jsonl(folder / "prompts.jsonl", prompts(12))
    recipe = write_recipe(folder, _teacher(folder), source)
    recipe.write_text(f"{recipe.read_text()}\n{more}")
    yield "plan", recipe


def _read(folder: Path, source: Path) -> Iterator[Command]:
    data = {"source": str(source), "format": "prompt", "holdout": 4}
    yield "run", write_recipe(folder, _teacher(folder), source, data=data), "--until", "data"


SIZES: dict[str, Callable[[Path, float], Iterator[Command]]] = {
    "a text of 50 MB": text,
    "100,000 prompts": many_prompts,
    "262,144 ids": vocabulary,
    "K = V = 32,768": every_id,
    "full, V = 32,768": full,
    "a recipe with a name of 1 MB": long_string,
    "a recipe of 1 MB of fields": many_fields,
    "a recipe of 1 MB of comments": comments,
    "Parquet of 5,000 columns": parquet_columns,
    "CSV of 5,000 columns": csv_columns,
    "import of 5,000 columns": imported_columns,
}


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument(
        "--tiny", action="store_true", help="a thousandth of each size, in this process"
    )
    asked = parser.parse_args()
    import_module("transformers.models.llama.modeling_llama")  # once, for all
    found = {name: here(name) if asked.tiny else apart(name) for name in asked.only}
    for name, row in found.items():
        figures = "{peak_mb:>8} MB{added_mb:>8} MB{cpu_seconds:>8} s{descriptors:>4}{files:>4}"
        wrong = "" if row["right"] else "NOT RIGHT "
        figures = figures.format(**row)
        sys.stdout.write(f"{name:<30}{row['codes']!s:>10}{figures}  {wrong}{row['said']}\n")
    sys.stdout.write(json.dumps({"most_mb": MOST_MB, "sizes": found}) + "\n")


def apart(name: str) -> dict[str, Any]:
    """A size in a process of its own, after the small one has been done there."""
    with tempfile.TemporaryDirectory(prefix="stillroom-sizes-") as root:
        kept = Path(root) / "found.json"

        def measured() -> None:
            signal.alarm(MOST_SECONDS)
            one(SIZES[name], SMALL, Path(root) / "small")
            kept.write_text(json.dumps(one(SIZES[name], 1.0, Path(root) / "whole")))

        ended = os.waitstatus_to_exitcode(os.waitpid(fork(measured), 0)[1])
        if ended:  # -14: it was still at it after MOST_SECONDS
            nothing = dict.fromkeys(FIGURES, 0)
            return {"codes": [ended], **nothing, "said": "ended by a signal", "right": False}
        found: dict[str, Any] = json.loads(kept.read_text())
        return found


def here(name: str) -> dict[str, Any]:
    """The small one alone, in this process; drawings, which take half of the time, are left out."""
    root = tempfile.TemporaryDirectory(prefix="stillroom-sizes-")
    with root, patch("stillroom.pipeline.report.plots.svg", lambda _: ""):
        return one(SIZES[name], SMALL, Path(root.name))


def one(
    size: Callable[[Path, float], Iterator[Command]], share: float, root: Path
) -> dict[str, Any]:
    """The commands of a size, and what is left of them."""
    temporary = root / "tmp"
    temporary.mkdir(parents=True)
    before, peak, began = _descriptors(), _peak(), time.process_time()
    with patch.object(tempfile, "tempdir", str(temporary)):
        codes, said = _do(size(root, share))
    return _judged(
        codes,
        said.replace(str(root), "DIR")[:200],
        peak_mb=_peak() >> 20,
        added_mb=(_peak() - peak) >> 20,
        cpu_seconds=round(time.process_time() - began, 1),
        descriptors=_descriptors() - before,
        files=len(list(temporary.rglob("*"))) + len(list(root.rglob(".tmp-*"))),
    )


def _judged(codes: list[int], said: str, **found: float) -> dict[str, Any]:
    well = codes[-1] in (0, 2) and "Traceback" not in said and found["added_mb"] < MOST_MB
    left = found["descriptors"] > 0 or found["files"] > 0
    return {"codes": codes, **found, "said": said, "right": well and not left}


def _do(commands: Iterator[Command]) -> tuple[list[int], str]:
    """The commands one after the other: their exit codes, and the last error."""
    codes, said = [], ""
    for words in commands:
        done = stillroom(*words, expect=None)
        codes.append(done.returncode)
        said = done.stderr[done.stderr.rfind("error:") :].strip() if done.returncode else said
    return codes, said


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
