"""Does it pay to score every turn of a conversation?

Students of all turns against students of the last one.

    python tests/bench/turns.py DIR [--tiny]        # a table, then one JSON line

Stories told in turns: a person says a sentence, the assistant the next one, three times each. The
teacher (stories260k) scores the assistant's turns, once all of them (`data.turns: all`) and once
the last of each conversation. Students are fresh and see the same conversations in the same order,
so as many tokens. They are judged on all turns of held-out conversations, with code of this file's
own. Half of the held-out conversations choose each arm's learning rate, the other half judge;
`±` is half a 95 % interval over seeds.
"""

import json
import shutil
import statistics
from argparse import ArgumentParser
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from arms import run_arm
from assets import ASSETS
from transformers import AutoModelForCausalLM

from stillroom.pipeline.report.seeds import interval
from stillroom.storage.snapshots.snapshot import load_snapshot
from stillroom.storage.store.store import Store
from stillroom.storage.tables.spans import positions, spans_of

TURNS = ("all", "last")
TEMPLATE = """{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}A: \
{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% else %}B: {{ m.content }}
{% endif %}{% endfor %}{% if add_generation_prompt %}A: {% endif %}"""


def write_conversations(path: Path, *, count: int) -> None:
    """Six sentences of a story each, told in turns."""
    stories = pq.read_table(ASSETS / "text" / "tinystories-8k" / "train.parquet")["text"]
    lines: list[str] = []
    for story in stories.to_pylist():
        sentences = [f"{part.strip()}." for part in story.replace("\n", " ").split(".")[:6]]
        if len(sentences) == 6 and all(3 < len(sentence.split()) < 14 for sentence in sentences):
            roles = ("user", "assistant") * 3
            turns = [
                {"role": role, "content": text} for role, text in zip(roles, sentences, strict=True)
            ]
            lines.append(json.dumps({"messages": turns}))
        if len(lines) == count:
            break
    path.write_text("\n".join(lines) + "\n")


def teacher_with_turns(folder: Path) -> Path:
    """The teacher with a chat template."""
    if not folder.is_dir():
        shutil.copytree(ASSETS / "models" / "stories260k-llama-hd32", folder)
        for file in folder.iterdir():
            file.chmod(0o644)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def recipe(folder: Path, turns: str, *, holdout: int) -> Path:
    """One arm's recipe; both have one store."""
    fields: dict[str, Any] = {
        "run": {"dir": str(folder / "runs" / turns)},
        "storage": {"dir": str(folder / "store")},
        "teacher": {"model": str(folder / "teacher")},
        "student": {
            "config": {
                "hidden_size": 40,
                "intermediate_size": 112,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 16,
            }
        },
        "data": {
            "source": str(folder / "conversations.jsonl"),
            "format": "messages",
            "turns": turns,
            "holdout": holdout,
        },
        "score": {"k": 16},
        "train": {"epochs": 2, "tokens_per_step": 1024},
        "evaluate": {"baseline": False},
    }
    path = folder / f"{turns}.yaml"
    path.write_text(json.dumps(fields))  # JSON is YAML
    return path


def judge(store: Path, snapshot: str, student: Path) -> list[float]:
    """Cross-entropy in nats a token of all turns of the held-out conversations.

    It is given of one half, and of the other.
    """
    model = AutoModelForCausalLM.from_pretrained(student).eval()
    opened = Store.open(store)
    chosen = load_snapshot(opened, snapshot)
    sums, counts = [0.0, 0.0], [0, 0]
    for shard in chosen.shards:
        for row in opened.rows(chosen.table, {shard.sha256: shard.rows}):
            scored = torch.from_numpy(positions(spans_of(row)))
            ids = torch.from_numpy(row["token_ids"]).long()
            with torch.inference_mode():
                logprobs = model(input_ids=ids[None]).logits[0].float().log_softmax(-1)
            half = row["prompt_key"][0] % 2
            sums[half] -= float(logprobs[scored - 1, ids[scored]].sum())
            counts[half] += len(scored)
    return [total / count for total, count in zip(sums, counts, strict=True)]


def compare(folder: Path, *, tiny: bool) -> dict[str, Any]:
    """Every arm at the learning rate that one half of the held-out conversations chose.

    It is judged on the other half.
    """
    folder.mkdir(parents=True, exist_ok=True)
    teacher_with_turns(folder / "teacher")
    write_conversations(folder / "conversations.jsonl", count=40 if tiny else 1200)
    rates = (1e-2,) if tiny else (1e-3, 3e-3, 1e-2, 3e-2)
    seeds = (0,) if tiny else (0, 1, 2)
    recipes = {turns: recipe(folder, turns, holdout=12 if tiny else 200) for turns in TURNS}
    for file in recipes.values():
        run_arm(file, until="score")
    found: dict[tuple[str, float, int], list[float]] = {}
    test = ""
    # The arm of all turns comes first: its held-out rows judge both.
    for turns, rate, seed in product(TURNS, rates, seeds):
        run_dir = folder / "runs" / f"{turns}-{rate}-{seed}"
        settings = {"run.dir": run_dir, "run.seed": seed, "train.learning_rate": rate}
        overrides = [f"{name}={value}" for name, value in settings.items()]
        done = run_arm(recipes[turns], overrides, until="train")
        test = test or done["snapshots"]["test"]
        found[turns, rate, seed] = judge(
            folder / "store", test, Path(done["train_dir"]) / "student"
        )
        print(
            f"turns {turns}, learning rate {rate}, seed {seed}: {found[turns, rate, seed]}",
            flush=True,
        )
    arms = {}
    for turns in TURNS:
        chosen = {r: statistics.mean(found[turns, r, s][0] for s in seeds) for r in rates}
        best = min(chosen, key=lambda rate: chosen[rate])
        judged = [found[turns, best, s][1] for s in seeds]
        arms[turns] = {"learning_rate": best, "rates": chosen, "cross_entropy": judged}
    gain = [b - a for a, b in zip(*(arms[t]["cross_entropy"] for t in TURNS), strict=True)]
    return {"arms": arms, "gain": gain}


def _spread(values: list[float]) -> str:
    mean, half = interval(values)
    return f"{mean:.4f}" + ("" if half is None else f" ± {half:.4f}")


def main() -> None:
    """Parse the command line, compare, print."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--tiny", action="store_true", help="seconds; shows nothing")
    arguments = parser.parse_args()
    found = compare(arguments.path, tiny=arguments.tiny)
    print("\n| scored | learning rate | held-out cross-entropy of all turns (nats) |")
    print("| --- | ---: | ---: |")
    for turns, arm in found["arms"].items():
        print(f"| {turns} | {arm['learning_rate']} | {_spread(arm['cross_entropy'])} |")
    print(f"| gain of all, paired by seed | | {_spread(found['gain'])} |")
    print(json.dumps({"bench": "turns", "results": found}))


if __name__ == "__main__":
    main()
