"""Where every second of a run goes, stage by stage.

It is the real command line, from prompts to a judged student.

    python tests/bench/pipeline.py [--tiny] [--out DIR] [--engine vllm|hf]

The bench makes a tokenizer and a teacher of about 16M parameters (on CUDA 180M) with random
weights, V = 16,384, and runs `stillroom run` on them in a process of its own. Each stage's process
splits its wall time (`stages/workers/clock.py`): start-up, model (vLLM's steps and a student's
steps with their losses count as that), tokenizer, files, and all else. The row `runner` is the
process of the command line itself: its start, and what it does between the stages. Rows add up to
the wall time of the command as measured from outside; what they miss is shown.

The bar: of its time after start-up, no stage spends more than 10 % on all else.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

BAR = 0.10
NAMES = ("start", "model", "tokenizer", "disk", "other")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """How large everything is."""

    vocabulary: int = 16_384
    hidden: int = 320
    layers: int = 8
    words: int = 30_000
    prompts: int = 480
    max_tokens: int = 96
    batch: int = 32
    """Rows of the hf engine."""
    student: int = 192
    epochs: int = 2
    held_out: int = 48


CUDA = Sizes(hidden=1024, layers=12, prompts=512, max_tokens=64, batch=256, student=512)
"""About 180M parameters: a GPU would wait for Python on fewer."""
TINY = Sizes(
    vocabulary=512,
    hidden=32,
    layers=2,
    words=500,
    prompts=24,
    max_tokens=8,
    student=16,
    epochs=1,
    held_out=4,
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="seconds; the figures mean nothing")
    parser.add_argument("--out", type=Path, help="folder for pipeline.json and the table")
    parser.add_argument(
        "--engine", choices=["vllm", "hf"], help="default: vllm where it is installed"
    )
    args = parser.parse_args()
    engine = args.engine or ("vllm" if find_spec("vllm") and not args.tiny else "hf")
    with tempfile.TemporaryDirectory() as folder:
        sizes = TINY if args.tiny else Sizes() if device() == platform.machine() else CUDA
        recipe = prepare(Path(folder), sizes, engine)
        rows, wall = run(recipe)
    shown = table(rows, wall)
    outcome = {
        "python": platform.python_version(),
        "tiny": args.tiny,
        "engine": engine,
        "cpus": os.cpu_count(),
    }
    outcome |= {
        "load_average": os.getloadavg()[0],
        "device": device(),
        "seconds": round(wall, 2),
        "stages": rows,
    }
    outcome["bars"] = [
        bar(name, row, tiny=args.tiny) for name, row in rows.items() if name != "runner"
    ]
    print(shown)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "pipeline.md").write_text(f"```\n{shown}\n```\n")
        (args.out / "pipeline.json").write_text(json.dumps(outcome, indent=1) + "\n")
    print(json.dumps(outcome))


def prepare(folder: Path, sizes: Sizes, engine: str) -> Path:
    """Write prompts, teacher and recipe; the recipe's path."""
    texts = sentences(sizes)
    save_teacher(folder / "teacher", texts, sizes)
    source = folder / "prompts.jsonl"
    source.write_text(
        "".join(json.dumps({"prompt": text}) + "\n" for text in texts[: sizes.prompts])
    )
    student = {
        "hidden_size": sizes.student,
        "intermediate_size": 3 * sizes.student,
        "num_hidden_layers": 2,
    }
    tree = {
        "run": {"dir": str(folder / "run")},
        "storage": {"dir": str(folder / "store")},
        "teacher": {"model": str(folder / "teacher")},
        "student": {"config": student | {"num_attention_heads": 4, "num_key_value_heads": 4}},
        "data": {"source": str(source), "format": "prompt", "holdout": sizes.held_out},
        "generate": {"engine": engine, "temperature": 1.0, "max_tokens": sizes.max_tokens}
        | ({"engine_args": {"batch_size": sizes.batch}} if engine == "hf" else {}),
        "score": {"k": 64},
        # Random weights with tied embeddings find the token before likeliest: to the audit that is
        # a shift.
        "train": {
            "epochs": sizes.epochs,
            "tokens_per_step": 4096,
            "learning_rate": 1.0e-3,
            "audit": "warn",
        },
        "evaluate": {"tokens": 50 * sizes.held_out, "gradient_tokens": 0},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return folder / "recipe.yaml"


def sentences(sizes: Sizes) -> list[str]:
    """Sentences of 10 to 40 invented words, the frequent ones as frequent as in English (Zipf)."""
    draw = random.Random(0)
    syllables = [
        a + b
        for a in "bdfgklmnprstvz"
        for b in ("a", "e", "i", "o", "u", "an", "el", "or", "ist", "un")
    ]
    words = list(
        dict.fromkeys(
            "".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(sizes.words)
        )
    )
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    count = max(sizes.prompts, sizes.words // 4)
    return [" ".join(draw.choices(words, weights, k=draw.randint(10, 40))) for _ in range(count)]


def save_teacher(folder: Path, texts: list[str], sizes: Sizes) -> None:
    """A Llama with random weights, and a byte-level BPE tokenizer that was trained on the texts."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer, bare.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=sizes.vocabulary,
        special_tokens=["<end>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bare.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=3 * sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=max(1, sizes.hidden // 32),
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=bare.token_to_id("<end>"),
    )
    model = LlamaForCausalLM(config)
    (model.bfloat16() if torch.cuda.is_available() else model).save_pretrained(folder)


def run(recipe: Path) -> tuple[dict[str, dict[str, float]], float]:
    """Stage -> seconds by name, `runner` first; and the command's wall time."""
    words = [sys.executable, "-m", "stillroom", "run", str(recipe), "--json"]
    began = time.monotonic()
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
    wall = time.monotonic() - began
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: exit {done.returncode}")
    outcome = json.loads(done.stdout.splitlines()[-1])
    return {"runner": outcome["clock"]} | {
        name: s["clock"] for name, s in outcome["stages"].items()
    }, wall


def share(row: dict[str, float]) -> float:
    """The share of the time after start-up that went to neither model, tokenizer nor files."""
    worked = sum(row.values()) - row["start"]
    return row["other"] / worked if worked else 0.0


def bar(name: str, row: dict[str, float], *, tiny: bool) -> dict[str, Any]:
    """One line of the bars; tiny figures mean nothing."""
    found = round(share(row), 3)
    what = f"{name}: share of its time after start-up outside model, tokenizer and disk"
    return {
        "what": what,
        "found": found,
        "bar": f"<= {BAR:.2f}",
        "met": None if tiny else found <= BAR,
    }


def table(rows: dict[str, dict[str, float]], wall: float) -> str:
    """Seconds, and the share that the bar is about."""
    lines = [
        f"{'seconds':<10}{'wall':>8}"
        + "".join(f"{name:>11}" for name in NAMES)
        + f"{'other/work':>12}"
    ]
    for name, row in rows.items():
        figures = "".join(f"{row[part]:>11.2f}" for part in NAMES)
        last = "" if name == "runner" else f"{share(row):>11.1%}"
        lines.append(f"{name:<10}{sum(row.values()):>8.2f}{figures}{last:>12}")
    sums = {part: sum(row[part] for row in rows.values()) for part in NAMES}
    lines.append(
        f"{'sum':<10}{sum(sums.values()):>8.2f}" + "".join(f"{sums[part]:>11.2f}" for part in NAMES)
    )
    missed = wall - sum(sums.values())
    lines.append(
        f"wall time of the command {wall:.2f} s, {missed:+.2f} s beside the sum: its end, and how "
        "exactly the"
    )
    lines.append("system tells when a process started")
    return "\n".join(lines)


def device() -> str:
    """What the models ran on."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()


if __name__ == "__main__":
    main()
