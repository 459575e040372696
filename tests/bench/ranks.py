"""Losses of a training by one rank and by several, with the same global batches.

    python tests/bench/ranks.py [--tiny] [--ranks 2] [--steps 60]

Every way to hold and to train a student is tried. Ranks are processes of one CPU that talk by gloo;
students, teachers and stores are the small ones of the tests. For each training it prints the
largest difference of a step's loss, of a gradient's norm (relative), and of the logits of the last
student on held-out texts; and whether each step had the same samples. Bars: 1e-5 for losses, 1e-4
for logits.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

LOSS_BAR, LOGITS_BAR = 1e-5, 1e-4


def main() -> None:
    """Train, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="one training of a few steps")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    asked = parser.parse_args()
    import together as support
    from ranked import Trainings, trained_by

    support.PATIENCE = 3600.0
    with tempfile.TemporaryDirectory() as folder:
        trainings, rows = Trainings(Path(folder)), []
        print("| training | steps | loss off by | norm off by | logits off by | same batches |")
        print("| --- | ---: | ---: | ---: | ---: | --- |")
        for case in matrix(trainings, 2 if asked.tiny else asked.steps):
            found = support.together(trained_by, [case], ranks=asked.ranks)
            rows.append(row := compared(case, [seen for (seen,) in found]))
            logits = "" if row["logits"] is None else f"{row['logits']:.1e}"
            cells = (row["steps"], f"{row['loss']:.1e}", f"{row['norm']:.1e}", logits, row["same"])
            print(f"| {row['name']} | {' | '.join(map(str, cells))} |", flush=True)
            if asked.tiny:
                break
    holds = all(
        row["loss"] < LOSS_BAR and (row["logits"] or 0) < LOGITS_BAR and row["same"] for row in rows
    )
    print(json.dumps({"ranks": asked.ranks, "rows": rows, "holds": holds}))


def matrix(trainings: Any, steps: int) -> Iterator[Any]:
    """All trainings, of about so many steps."""
    tokens = 99 * steps
    for tied, full, held in product((False, True), (True, False), ("ddp", "fsdp2")):
        name = f"{held}, {'tied' if tied else 'untied'}, {'full' if full else 'top 6'}"
        student = {"config": {"num_hidden_layers": 2, "tie_word_embeddings": tied}}
        yield trainings.causal(name, held, student=student, full=full, tokens=tokens)
        yield trainings.lora(f"{name}, LoRA", held, tied=tied, full=full, tokens=tokens)
    for held in ("ddp", "fsdp2"):
        often = {"epochs": None, "tokens": tokens, "tokens_per_step": 99}
        yield trainings.sampled(f"{held}, sampled", held, **often)
        yield trainings.features(f"{held}, features", held, **often)
        yield trainings.classes(f"{held}, classes", held, **often)


def compared(case: Any, seen: list[Any]) -> dict[str, Any]:
    """A training by several ranks beside the same by one."""
    from ranked import alone, off

    one = alone(case)
    loss, norm = off(seen[0], one)
    steps = zip(*(rank.taken for rank in seen), strict=True)
    joined = [sorted(number for part in parts for number in part) for parts in steps]
    same = joined == [sorted(taken) for taken in one.taken]
    return {
        "name": case.name,
        "steps": len(one.losses),
        "loss": loss,
        "norm": norm,
        "logits": logits_off(case),
        "same": same,
    }


def logits_off(case: Any) -> float | None:
    """Of the two students, on texts that were not trained on.

    None of a classifier, which reads none of them.
    """
    import torch
    from ranked import student_of
    from tiny_store import random_texts
    from transformers import AutoConfig, AutoModelForCausalLM

    folders = [student_of(case, by_one=which) for which in (False, True)]
    if "CausalLM" not in AutoConfig.from_pretrained(folders[0]).architectures[0]:
        return None
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in folders]
    worst = 0.0
    for text in random_texts(20, seed=1):
        found, right = (model(input_ids=torch.tensor([text])).logits for model in models)
        worst = max(worst, float((found - right).abs().max().detach()))
    return worst


if __name__ == "__main__":
    main()
