"""What soft targets cost a training step.

KL + cross-entropy from a store is compared with cross-entropy from the same store.

    python tests/bench/train_step.py [--tiny] [--out DIR] [--turns N] [--compile]

All arms train the same student on the same samples in the same order, in turns in one process;
ratios are medians over the turns. On a GPU the student is of the size of Qwen2.5-0.5B (V = 151,936,
K = 64, bfloat16), on a CPU about 15M parameters (V = 32,768, K = 64, float32); samples are as long
as short stories, written to a store as a teacher's.

    KL + CE         the product: divergence and cross-entropy
    CE              the product with soft targets switched off, which it then does not read
    padded rows     as KL + CE, samples packed into rows instead of one flat row
    checkpointing   as KL + CE, activations of the body made again on the way back
    plain CE        logits of the whole pass, torch's cross_entropy; the product's passes and
                    optimizer
    liger CE        Liger's fused linear cross-entropy, likewise (GPU)
    compiled        as KL + CE, the body through torch.compile (--compile; its first steps are not
                    counted, but shown)

"by CPU": the same ratio by CPU seconds of the process, which other work on the machine disturbs
less; of a GPU it says nothing. Tokens are those of the samples: padding counts as nothing. MFU and
waiting are as in `train.json`. Bar on an H200: KL + CE at least 0.95 of the tokens/s of CE.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from stillroom.stages.loader.packing import Packing
from stillroom.stages.loader.prefetch import Prefetch
from stillroom.stages.loader.samples import Cursor, Samples, steps
from stillroom.stages.losses.definition import Distilled
from stillroom.stages.losses.objective import Aim
from stillroom.stages.models.attention.flat import attend_apart
from stillroom.stages.models.head import hidden_states, split_head
from stillroom.stages.recipe.sections import Loss, Train
from stillroom.stages.train.flops import ModelFlops, Peak
from stillroom.stages.train.speed import Meter, Speed
from stillroom.stages.train.trainer import Trainer
from stillroom.storage.keys import content_key
from stillroom.storage.snapshots.snapshot import make_snapshot
from stillroom.storage.store.store import Store
from stillroom.storage.tables.soft_targets import SoftTargets

BAR = 0.95


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large everything is."""

    config: dict[str, Any]
    """Of a Llama or, with `tie_word_embeddings`, a Qwen2 student."""
    k: int
    rows: int
    tokens_per_step: int
    tokens_per_pass: int
    steps: int
    """Timed in a turn."""
    dtype: torch.dtype = torch.float32


GPU = Scale(
    config={
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    k=64,
    rows=2000,
    tokens_per_step=32_768,
    tokens_per_pass=16_384,
    steps=8,
    dtype=torch.bfloat16,
)
CPU = Scale(
    config={
        "vocab_size": 32_768,
        "hidden_size": 288,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
    },
    k=64,
    rows=40,
    tokens_per_step=1024,
    tokens_per_pass=1024,
    steps=1,
)
TINY = Scale(
    config={
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
    k=8,
    rows=12,
    tokens_per_step=1024,
    tokens_per_pass=512,
    steps=1,
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="seconds; the figures mean nothing")
    parser.add_argument("--out", type=Path, help="write the outcome to train_step.json there, too")
    parser.add_argument("--turns", type=int, help="of every arm")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile as well: a minute or two to compile"
    )
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scale = TINY if args.tiny else GPU if device.type == "cuda" else CPU
    turns = args.turns or (2 if args.tiny else 5)
    with tempfile.TemporaryDirectory() as folder:
        samples = write_store(
            Path(folder) / "store",
            rows=scale.rows,
            vocab_size=scale.config["vocab_size"],
            k=scale.k,
        )
        arms = make_arms(scale, samples, device, compiled=args.compile)
        for _ in range(turns):
            for arm in arms.values():
                arm.turn(scale)
    outcome = described(device, scale, turns, tiny=args.tiny) | {"arms": table(arms)}
    outcome["kl_over_ce"] = outcome["arms"]["KL + CE"]["over_ce"]
    if device.type == "cuda" and not args.tiny:
        outcome["bars"] = {
            "KL + CE over CE, tokens/s": {"found": outcome["kl_over_ce"], "at_least": BAR}
        }
    show(outcome)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "train_step.json").write_text(json.dumps(outcome, indent=1) + "\n")
    print(json.dumps(outcome))


# Arms


class Arm:
    """One way to train, going on through the epochs from turn to turn."""

    def __init__(self, trainer: Trainer, samples: Samples, meter: Meter) -> None:
        self.trainer, self._samples, self._meter = trainer, samples, meter
        self._cursor = Cursor()
        self.turns: list[Speed] = []
        self.cpu_seconds: list[float] = []
        self.first_seconds = 0.0
        self.notes: dict[str, Any] = {}

    def turn(self, scale: Scale) -> None:
        """Some steps, after one that is not counted: the prefetching is in its stride by then."""
        total, cpu, spent = Speed(), time.process_time(), 0.0
        read = steps(self._samples, self._cursor, tokens_per_step=scale.tokens_per_step)
        with Prefetch(read, lambda step: self.trainer.passes(step, done=0.5)) as feed:
            began, waited = time.perf_counter(), feed.waited_seconds
            for number, step in enumerate(feed):
                result = self.trainer.step(step, done=0.5, passes=feed.passes)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                seconds = time.perf_counter() - began
                spent += (time.process_time() - cpu) if number else 0.0
                if number:
                    this = self._meter.add(
                        step,
                        positions=result.positions,
                        seconds=seconds,
                        waited=feed.waited_seconds - waited,
                    )
                    for name in (
                        "tokens",
                        "positions",
                        "seconds",
                        "waited_seconds",
                        "peak_seconds",
                    ):
                        setattr(total, name, getattr(total, name) + getattr(this, name))
                else:
                    self.first_seconds = self.first_seconds or seconds
                self._cursor = step.after
                if number == scale.steps:
                    break
                began, waited, cpu = time.perf_counter(), feed.waited_seconds, time.process_time()
        read.close()
        self.turns.append(total)
        self.cpu_seconds.append(spent)


class Plain(Trainer):
    """Cross-entropy over the logits of the whole pass, by torch."""

    def _pass(self, batch: Any, aim: Aim) -> Distilled:
        device = batch.token_ids.device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self._dtype == torch.bfloat16):
            states = hidden_states(self.model, **batch.inputs).flatten(0, 1)[batch.predicting]
        total = self._head_loss(states.to(self._dtype), batch.targets.labels)
        return Distilled(total=aim.hard_weight * total, hard=total.detach()[None], soft=None)

    def _head_loss(self, states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = functional.linear(states, split_head(self.model).weight.to(states.dtype))
        return functional.cross_entropy(logits.float(), labels, reduction="sum")


class Liger(Plain):
    """Liger's fused linear cross-entropy."""

    def _head_loss(self, states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        weight = split_head(self.model).weight.to(states.dtype)
        total: torch.Tensor = LigerFusedLinearCrossEntropyLoss(reduction="sum")(
            weight, states, labels
        )
        return total


def make_arms(
    scale: Scale, soft: Samples, device: torch.device, *, compiled: bool
) -> dict[str, Arm]:
    hard = Samples(soft._store, soft.snapshot, soft=False)
    kl, ce = Loss(soft_weight=1.0, hard_weight=0.1), Loss(soft_weight=0.0, hard_weight=1.0)
    arms = {
        "KL + CE": make_arm(scale, soft, kl, device),
        "CE": make_arm(scale, hard, ce, device),
        "padded rows": make_arm(scale, soft, kl, device, flat=False),
        "checkpointing": make_arm(scale, soft, kl, device, checkpointing=True),
        "plain CE": make_arm(scale, hard, ce, device, kind=Plain),
    }
    if device.type == "cuda":
        arms["liger CE"] = make_arm(scale, hard, ce, device, kind=Liger)
    if compiled:
        # On a CPU a flat row is a loop over samples, unrolled and compiled anew for every number of
        # them.
        arms["compiled"] = make_arm(
            scale, soft, kl, device, compiled=True, flat=device.type == "cuda"
        )
    return arms


def make_arm(
    scale: Scale,
    samples: Samples,
    loss: Loss,
    device: torch.device,
    *,
    kind: type[Trainer] = Trainer,
    **how: bool,
) -> Arm:
    """`how`: `flat` (true by default), `checkpointing`, `compiled`."""
    model = student(scale, device)
    flat = (
        how.get("flat", True)
        and attend_apart(model, samples.lengths().longest, scale.dtype) is None
    )
    if how.get("checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if how.get("compiled"):
        model.base_model.compile(dynamic=True)
    packing = Packing(
        tokens_per_pass=scale.tokens_per_pass, flat=flat, vocab_size=scale.config["vocab_size"]
    )
    train = Train(tokens=1, learning_rate=1e-4)
    trainer = kind(model, packing=packing, loss=loss, train=train, dtype=scale.dtype)
    flops = ModelFlops.of(model, head=split_head(model).weight)
    made = Arm(trainer, samples, Meter(Speed(), flops, peak_of(device, scale.dtype)))
    made.notes = {"parameters": sum(p.numel() for p in model.parameters()), "flat": flat}
    return made


@cache
def peak_of(device: torch.device, dtype: torch.dtype) -> Peak:
    """Measured once, for all arms."""
    return Peak.at(device, dtype)


def student(scale: Scale, device: torch.device) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(**scale.config, tie_word_embeddings=True, max_position_embeddings=4096)
    with device:
        return Qwen2ForCausalLM(config).float()


# The store


def write_store(root: Path, *, rows: int, vocab_size: int, k: int, seed: int = 0) -> Samples:
    """Samples as long as short stories (median 180 tokens), prompts of a tenth.

    Random targets of K entries.
    """
    rng = np.random.default_rng(seed)
    about = {
        "teacher_id": "t" * 32,
        "tokenizer_id": "k" * 32,
        "vocab_size": vocab_size,
        "mantissa_bits": 10,
    }
    store = Store.open(root, create=True)
    with store.writer("soft_targets", about=about | {"head": "lm"}) as writer:
        for number in range(rows):
            length = int(np.clip(rng.lognormal(5.2, 0.4), 16, 1024))
            start = max(1, length // 10)
            targets = random_targets(rng, length - start, vocab_size=vocab_size, k=k)
            assert targets.ids is not None
            ids = rng.integers(0, vocab_size, length)
            ids[start:] = targets.ids[:, 0]
            key = content_key("bench", number=number)
            names = dict.fromkeys(
                ("key", "reuse_key", "tokens_key", "generation_key", "prompt_key"), key
            )
            more = {
                "teacher_id": about["teacher_id"],
                "kind": "topk",
                "span_start": start,
                "token_ids": ids,
            }
            writer.add(names | more | targets.columns(10))
    places = {
        commit.shard.sha256: range(commit.shard.rows) for commit in store.commits("soft_targets")
    }
    return Samples(store, make_snapshot(store, "soft_targets", places, {}), soft=True)


def random_targets(
    rng: np.random.Generator, positions: int, *, vocab_size: int, k: int
) -> SoftTargets:
    """Distinct ids anywhere.

    Log-probabilities that fall like a language model's, some mass outside.
    """
    steps_apart = rng.integers(1, vocab_size // k + 1, (positions, k)).cumsum(axis=1) - 1
    ids = rng.permuted(steps_apart, axis=1).astype(np.int32)
    heights = -np.sort(rng.gamma(0.7, 3.0, (positions, k)), axis=1) * rng.gamma(
        2.0, 0.7, (positions, 1)
    )
    kept = rng.beta(12.0, 1.0, (positions, 1))
    logprobs = heights - np.log(np.exp(heights).sum(axis=1, keepdims=True)) + np.log(kept)
    entropy = -(np.exp(logprobs) * logprobs).sum(axis=1)
    floats = [
        x.astype(np.float32) for x in (logprobs, np.log1p(-kept[:, 0]), logprobs[:, 0], entropy)
    ]
    return SoftTargets(ids, *floats)


# What came of it


def described(device: torch.device, scale: Scale, turns: int, *, tiny: bool) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    return {
        "tiny": tiny,
        "device": name,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {package: version(package) for package in ("torch", "transformers")},
        "student": scale.config,
        "dtype": str(scale.dtype),
        "k": scale.k,
        "tokens_per_step": scale.tokens_per_step,
        "tokens_per_pass": scale.tokens_per_pass,
        "turns": turns,
    }


def table(arms: dict[str, Arm]) -> dict[str, dict[str, Any]]:
    """Medians over the turns; ratios to CE of the same turn."""
    found = {}
    for name, arm in arms.items():
        rates = [turn.tokens / turn.seconds for turn in arm.turns]
        base = [turn.tokens / turn.seconds for turn in arms["CE"].turns]
        worked, usual = (
            [s / t.tokens for s, t in zip(a.cpu_seconds, a.turns, strict=True)]
            for a in (arm, arms["CE"])
        )
        found[name] = {
            "tokens_per_second": round(statistics.median(rates)),
            "over_ce": round(statistics.median(a / b for a, b in zip(rates, base, strict=True)), 3),
            "cpu_over_ce": round(
                statistics.median(b / a for a, b in zip(worked, usual, strict=True)), 3
            ),
            "mfu": statistics.median(turn.rates["mfu"] for turn in arm.turns),
            "waited_share": statistics.median(turn.rates["waited_share"] for turn in arm.turns),
            "padding_share": statistics.median(turn.padding_share for turn in arm.turns),
            "first_step_seconds": round(arm.first_seconds, 2),
            "peak": arm._meter.peak.of,
            **arm.notes,
        }
    return found


def show(outcome: dict[str, Any]) -> None:
    arms = outcome["arms"]
    first = next(iter(arms.values()))
    print(
        f"{outcome['device']}, {first['parameters'] / 1e6:.1f}M parameters, {outcome['dtype']}, K "
        f"= {outcome['k']}"
    )
    print(f"MFU against: {first['peak']}")
    print(
        f"{'arm':<15}{'tokens/s':>10}{'of CE':>8}{'by CPU':>8}"
        f"{'MFU':>8}{'padding':>9}{'waited':>8}{'first step s':>14}"
    )
    for name, row in arms.items():
        shares = f"{row['mfu']:>8.1%}{row['padding_share']:>9.1%}{row['waited_share']:>8.1%}"
        print(
            f"{name:<15}{row['tokens_per_second']:>10}{row['over_ce']:>8.3f}"
            f"{row['cpu_over_ce']:>8.3f}{shares}{row['first_step_seconds']:>14.2f}"
        )
    bar = "" if outcome["tiny"] else f" (bar on an H200: {BAR})"
    print(f"KL + CE over CE: {outcome['kl_over_ce']:.3f}{bar}")


if __name__ == "__main__":
    main()
