"""What scoring costs over the teacher's bare forward pass: top-64 and tail, in one run, in turns.

    python tests/bench/score.py [--tiny] [--out DIR] [--rows N] [--rounds N] [--cpu]

On an NVIDIA GPU the teacher has the shape of a 1B-parameter Llama in bfloat16, V = 128,256; on a
CPU 15M parameters in float32, V = 32,768. Its weights are random: they cost what trained ones cost.
Texts are random words of one length, and every token but the first is scored.

    bare         hidden states, and the logits of every scored position, a chunk at a time
    reduced      the same, and what is kept of each position: on the host, as numpy arrays
    stage        the real stage: journal, rows, shards written, synced, read back and committed;
                 without start-up
    plain torch  bare, and log_softmax, topk, entropy and the logsumexp of the rest, in float32, a
                 chunk at a time

All go through the same rows in the same batches. Each round does them all, in an order that turns;
ratios to `bare` are taken within a round, then the median. It also says where the stage's seconds
went, by its clock, and the largest differences of what is kept to float64. vLLM's prompt
log-probabilities are left out: they come from an engine whose bare forward pass is another
(`engines.py` has what they say).

It prints a table, then one line of JSON; with --out writes both there too.
"""

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import numpy as np
import torch
from kit import recipe_tree, write_jsonl
from tiny_jobs import teacher_job
from tiny_llama import WORDS, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from stillroom.stages.data import stage as data
from stillroom.stages.models.causal_lm import load_causal_lm
from stillroom.stages.models.head import Head, hidden_states, split_head
from stillroom.stages.recipe.sections import Recipe
from stillroom.stages.score import stage as score
from stillroom.stages.score.scorer import GPU_BATCH_TOKENS
from stillroom.stages.targets.draws import Span
from stillroom.stages.targets.entries_and_tail import Reducer, chunk_rows
from stillroom.stages.targets.spec import Kept
from stillroom.stages.workers.job import Job
from stillroom.storage.store.store import Store

K = 64
KEPT = Kept(kind="topk", k=K)
Batch = Tensor
"""[B, T] token ids."""
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 1000,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
    },
    "cpu": {
        "vocab_size": 32_768,
        "hidden_size": 288,
        "intermediate_size": 1024,
        "num_hidden_layers": 5,
    },
    "cuda": {
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
    },
}
HEADS = {"tiny": (2, 1), "cpu": (6, 2), "cuda": (32, 8)}
SIZES = {"tiny": (12, 24, 1), "cpu": (64, 256, 5), "cuda": (160, 1024, 3)}
"""Rows, tokens of a row, rounds."""


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="seconds; the figures mean nothing")
    parser.add_argument("--cpu", action="store_true", help="not on the GPU that is there")
    parser.add_argument("--out", type=Path, help="folder for score.json and score.md")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--rounds", type=int)
    words = parser.parse_args()
    if words.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = "tiny" if words.tiny else device
    with tempfile.TemporaryDirectory(prefix="stillroom-score-") as folder:
        outcome = measured(Path(folder), shape, device, words)
    text = table(outcome)
    print(text)
    if words.out:
        words.out.mkdir(parents=True, exist_ok=True)
        (words.out / "score.md").write_text(text + "\n")
        (words.out / "score.json").write_text(json.dumps(outcome, indent=1) + "\n")
    print(json.dumps(outcome))


def measured(folder: Path, shape: str, device: str, words: Namespace) -> dict[str, Any]:
    """All figures of one teacher."""
    rows, length, rounds = SIZES[shape]
    rows, rounds = words.rows or rows, words.rounds or rounds
    teacher = save_teacher(folder / "teacher", shape, length)
    source = write_jsonl(folder / "texts.jsonl", texts(rows, length))
    bench = Bench(folder, teacher, source)
    arms: dict[str, Callable[[], float]] = {
        "bare": lambda: timed(bench.bare),
        "reduced": lambda: timed(bench.reduced),
        "stage": bench.stage,
        "plain torch": lambda: timed(bench.plain),
    }
    for name in ("bare", "reduced", "plain torch"):
        arms[name]()
    turns: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds):
        names = list(arms)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            turns[name].append(arms[name]())
    tokens = sum(batch.numel() - len(batch) for batch in bench.batches)
    found: dict[str, Any] = {
        "bench": "score",
        "tiny": words.tiny,
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} CPUs",
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers")},
        "teacher": SHAPES[shape]
        | {"parameters": bench.parameters, "dtype": str(bench.dtype).removeprefix("torch.")},
        "k": K,
        "rows": rows,
        "row_tokens": length,
        "rounds": rounds,
        "tokens_per_second": {
            name: round(tokens / statistics.median(found)) for name, found in turns.items()
        },
        "over_bare": {
            name: round(
                statistics.median(a / b for a, b in zip(found, turns["bare"], strict=True)), 4
            )
            for name, found in turns.items()
        },
        "stage_clock": shares(bench.clocks),
        "errors": bench.errors(),
    }
    found["bars"] = bars(found, device)
    return found


def save_teacher(folder: Path, shape: str, length: int) -> Path:
    heads, shared = HEADS[shape]
    config = LlamaConfig(
        **SHAPES[shape],
        num_attention_heads=heads,
        num_key_value_heads=shared,
        max_position_embeddings=length,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if shape == "cuda" else "cpu"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16 if shape == "cuda" else torch.float32
        )
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def texts(rows: int, length: int) -> list[dict[str, str]]:
    """Random words; a text is a token longer, for it starts with <s>."""
    chosen = np.random.default_rng(0).choice(WORDS, (rows, length - 1))
    return [{"text": " ".join(words)} for words in chosen]


def timed(work: Callable[[], None]) -> float:
    """Seconds, until the device is done."""
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


class Bench:
    """A teacher, the rows to score, and the ways to do it."""

    def __init__(self, folder: Path, teacher: Path, source: Path) -> None:
        self._folder, self._teacher, self._source = folder, teacher, source
        self.clocks: list[dict[str, float]] = []
        self._runs = 0
        self._reload()

    def _reload(self) -> None:
        job, identity = self._job()
        self.model = load_causal_lm(identity)
        self.parameters = self.model.num_parameters()
        self.dtype = self.model.dtype
        self._head = split_head(self.model)
        self._reducer = Reducer(self._head)
        store = Store.open(job.recipe.storage.dir)
        (rows,) = [
            list(store.rows("generations", {c.shard.sha256: range(c.shard.rows)}, ["token_ids"]))
            for c in store.commits("generations")
        ]
        ids = torch.from_numpy(np.stack([row["token_ids"] for row in rows]).astype(np.int64))
        per_batch = (
            max(1, GPU_BATCH_TOKENS // ids.shape[1]) if self.model.device.type == "cuda" else 1
        )
        self.batches = list(ids.split(per_batch))

    def _job(self) -> tuple[Job, Any]:
        """The stage's job, on a store of its own with the texts in it."""
        self._runs += 1
        place = self._folder / str(self._runs)
        place.mkdir()
        tree = recipe_tree(
            place,
            self._teacher,
            self._source,
            generate=None,
            score={"k": K},
            evaluate={"tokens": 1},
        )
        tree["data"] = {"source": str(self._source), "format": "text", "holdout": 0}
        tree["storage"] = {"dir": str(place / "store"), "commit_rows": 32}
        recipe = Recipe.model_validate(tree)
        _, job, teacher = teacher_job(recipe)
        data.run(job)
        return job, teacher

    def _states(self) -> Iterator[tuple[Batch, Tensor, Tensor]]:
        """Batches, hidden states [N, D] of all but their last positions, and the next tokens."""
        for batch in self.batches:
            ids = batch.to(self.model.device)
            hidden = hidden_states(self.model, input_ids=ids, attention_mask=torch.ones_like(ids))
            yield batch, hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten()

    def _logits(self) -> Iterator[tuple[Tensor, Tensor]]:
        size = chunk_rows(self._head, KEPT)
        for _, states, following in self._states():
            for start in range(0, len(states), size):
                yield (
                    self._head.exact_logits(states[start : start + size]),
                    following[start : start + size],
                )

    @torch.inference_mode()
    def bare(self) -> None:
        for _ in self._logits():
            pass

    @torch.inference_mode()
    def reduced(self) -> None:
        arriving = None
        for batch, states, following in self._states():
            spans = [Span(batch.shape[1] - 1)] * len(batch)
            begun = self._reducer.launch(states, following, kept=KEPT, spans=spans)
            if arriving is not None:
                arriving.rows()
            arriving = begun
        assert arriving is not None
        arriving.rows()

    @torch.inference_mode()
    def plain(self) -> None:
        for logits, following in self._logits():
            for values in plain_reduction(logits, following).values():
                values.cpu()

    def stage(self) -> float:
        """Seconds of the real stage, its start-up apart."""
        job, identity = self._job()
        result = score.run(job, identity)
        assert result.rows == sum(len(batch) for batch in self.batches)
        seconds = job.clock.seconds()
        self.clocks.append(seconds)
        return sum(seconds.values()) - seconds["start"]

    @torch.inference_mode()
    def errors(self) -> dict[str, dict[str, float]]:
        """Largest differences to float64 from the same hidden states.

        They are ours, and those of plain torch.
        """
        _, states, following = next(self._states())
        states, following = states[:64], following[:64]
        truth = wide(self._head, states).log_softmax(-1).cpu()
        (ours,) = self._reducer.launch(
            states, following, kept=KEPT, spans=[Span(len(states))]
        ).rows()
        plain = {
            name: values.cpu()
            for name, values in plain_reduction(self._head.exact_logits(states), following).items()
        }
        assert ours.ids is not None
        sides = {
            "ours": {name: torch.from_numpy(getattr(ours, name)) for name in plain},
            "plain torch": plain,
        }
        return {name: differences(side, truth, following.cpu()) for name, side in sides.items()}


def wide(head: Head, states: Tensor) -> Tensor:
    """Logits in float64."""
    return states.double() @ head.weight.double().T


def plain_reduction(logits: Tensor, following: Tensor) -> dict[str, Tensor]:
    """The reduction as it is written down: each number by a pass of its own."""
    logprobs = logits.float().log_softmax(-1)
    token = logprobs.gather(-1, following[:, None])[:, 0]
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    best, ids = logprobs.topk(K, dim=-1)
    tail = logprobs.scatter_(-1, ids, -torch.inf).logsumexp(-1)
    return {
        "ids": ids,
        "logprobs": best,
        "tail_logprob": tail,
        "token_logprob": token,
        "entropy": entropy,
    }


def differences(found: dict[str, Tensor], truth: Tensor, following: Tensor) -> dict[str, float]:
    """Largest difference of each number, nats.

    Entries are compared id by id, the tail over the ids outside them.
    """
    ids = found["ids"].long()
    expected = {
        "logprobs": truth.gather(-1, ids),
        "tail_logprob": truth.scatter(-1, ids, -torch.inf).logsumexp(-1),
        "token_logprob": truth.gather(-1, following[:, None])[:, 0],
        "entropy": -(truth.exp() * truth).sum(-1),
    }
    return {name: float((found[name] - value).abs().max()) for name, value in expected.items()}


def shares(clocks: list[dict[str, float]]) -> dict[str, float]:
    """Share of the stage's time without start-up that each name has, over all rounds.

    The seconds of start-up.
    """
    total = {name: sum(clock[name] for clock in clocks) for name in clocks[0]}
    whole = sum(total.values()) - total["start"]
    found = {name: round(spent / whole, 4) for name, spent in total.items() if name != "start"}
    return found | {"start_seconds": round(total["start"] / len(clocks), 2)}


def bars(found: dict[str, Any], device: str) -> list[dict[str, Any]]:
    """What must hold, and whether it does."""
    limits = [
        (
            "share of the stage's time outside model, tokenizer and disk",
            found["stage_clock"]["other"],
            0.10,
        )
    ]
    if device == "cuda":
        limits.append(
            ("time of scoring over the bare forward pass", found["over_bare"]["reduced"], 1.05)
        )
    judged = not found["tiny"]  # tiny figures mean nothing
    return [
        {
            "what": what,
            "found": value,
            "bar": f"<= {bar:.2f}",
            "met": value <= bar if judged else None,
        }
        for what, value, bar in limits
    ]


def table(outcome: dict[str, Any]) -> str:
    """The table for people."""
    teacher, clock = outcome["teacher"], outcome["stage_clock"]
    lines = [
        f"{outcome['device']}, {outcome['threads']} threads, load {outcome['load_average']}; "
        f"teacher of {teacher['parameters'] / 1e6:.0f}M parameters, {teacher['dtype']}, V = "
        f"{teacher['vocab_size']}, {outcome['rows']} rows of {outcome['row_tokens']} tokens, K = "
        f"{outcome['k']}, medians of {outcome['rounds']}",
        "",
        "| | scored tokens/s | time over bare |",
        "| --- | ---: | ---: |",
    ]
    for name, ratio in outcome["over_bare"].items():
        lines.append(f"| {name} | {outcome['tokens_per_second'][name]:,} | {ratio:.3f} |")
    names = ", ".join(
        f"{name} {100 * clock[name]:.1f} %" for name in ("model", "tokenizer", "disk", "other")
    )
    lines += ["", f"The stage's time: {names}; start-up {clock['start_seconds']} s apart.", ""]
    lines += [
        "| largest difference to float64, nats | logprobs | tail | token | entropy |",
        "| --- |" + " ---: |" * 4,
    ]
    for side, found in outcome["errors"].items():
        lines.append(f"| {side} | " + " | ".join(f"{value:.1e}" for value in found.values()) + " |")
    lines += ["", "| bar | | found | |", "| --- | ---: | ---: | --- |"]
    for bar in outcome["bars"]:
        verdict = {True: "met", False: "**not met**", None: "not judged"}[bar["met"]]
        lines.append(f"| {bar['what']} | {bar['bar']} | {bar['found']} | {verdict} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
