"""Does the teacher's distribution teach more than its text? TinyStories, one store, many students.

    python tests/bench/tinystories.py prompts stories.jsonl
    python tests/bench/tinystories.py compare DIR [--tiny]

The first writes the first words of stories, for the recipe. The second is the comparison: a table,
then one line of JSON.

Teacher: stories260k; text at temperature 1 by vLLM where it is installed; K = 16. Student: fresh,
about 100k weights. Each arm (soft targets and a little cross-entropy; cross-entropy alone) gets the
same start, order and tokens, six learning rates and three seeds, at one pass over the data and at
four. Each arm is compared at its own best learning rate, which prompts of a validation split choose
by the mean of its loss over the seeds; other prompts judge. Pairs are by seed, and `±` is half a
95 % interval over seeds. A best rate at an edge of the grid is said. A run that was stopped goes on
where it was.
"""

import json
import statistics
from argparse import ArgumentParser
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from os import cpu_count, environ
from pathlib import Path
from typing import Any

import torch
from arms import run_arm
from assets import ASSETS

from stillroom.pipeline.report.seeds import interval

RECIPE = Path(__file__).parents[2] / "pipeline" / "recipes" / "tinystories.yaml"
WORDS = 12
ARMS = ("student", "baseline")
METRICS = ("kl_teacher", "cross_entropy")
RATES = (0.75e-3, 1.5e-3, 3.0e-3, 6.0e-3, 12.0e-3, 24.0e-3)


def write_prompts(path: Path, *, count: int = 2000) -> None:
    """The first words of `count` different stories, one JSON object per line."""
    import pyarrow.parquet as pq

    stories = pq.read_table(ASSETS / "text" / "tinystories-8k" / "train.parquet", columns=["text"])[
        "text"
    ].to_pylist()
    openings = dict.fromkeys(" ".join(story.split()[:WORDS]) for story in stories)
    lines = [json.dumps({"prompt": opening}) for opening in list(openings)[:count]]
    path.write_text("\n".join(lines) + "\n")


def words(settings: dict[str, object]) -> list[str]:
    """Settings as `--set` takes them."""
    return [f"{name}={json.dumps(value)}" for name, value in settings.items()]


def compare(folder: Path, *, tiny: bool) -> dict[str, object]:
    """All runs, each arm at its best learning rate, paired by seed."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = folder / "stories.jsonl"
    write_prompts(prompts, count=60 if tiny else 2000)
    rates = (6.0e-3,) if tiny else RATES
    seeds = (0,) if tiny else (0, 1, 2)
    passes = (1,) if tiny else (1, 4)
    base: dict[str, object] = {
        "storage.dir": str(folder / "store"),
        "data.source": str(prompts),
        "evaluate.generate": None,
        "train.evaluate_every_tokens": 100_000,
        "train.validation_prompts": 100,
        "run.dir": str(folder / "runs" / "first"),
    }
    if tiny:
        base |= {
            "generate.max_tokens": 12,
            "data.holdout": 6,
            "train.evaluate_every_tokens": 500,
            "train.validation_prompts": 6,
            "evaluate.tokens": 60,
            "generate.engine": "hf",
        }
    run_arm(RECIPE, words(base), until="score")
    choices = list(product(passes, rates, seeds))
    found = {}
    runs = _run_all([words(base | _changes(folder, *choice)) for choice in choices])
    for choice, run in zip(choices, runs, strict=True):
        found[choice] = run["results"]
        for arm, folder_of_arm in run["train_dirs"].items():
            trained = json.loads((Path(folder_of_arm) / "train.json").read_text())
            found[choice][arm]["validation_loss"] = trained["best"]["loss"]
        _say(choice, found[choice])
    return {str(epochs): _at_best(found, epochs, rates, seeds) for epochs in passes}


def _run_all(asked: list[list[str]]) -> Iterator[dict[str, Any]]:
    """They share the cores, one thread each; a spawned process has no lock or thread of this one.

    One alone runs here.
    """
    if len(asked) == 1:
        yield run_arm(RECIPE, asked[0])
        return
    with ProcessPoolExecutor(
        min(len(asked), cpu_count() or 1),
        mp_context=get_context("spawn"),
        initializer=_one_thread,
    ) as pool:
        for run in [pool.submit(run_arm, RECIPE, overrides) for overrides in asked]:
            yield run.result()


def _one_thread() -> None:
    """By this name, for a vLLM that ran here has put a function of its own in place of torch's."""
    torch.set_num_threads(1)


def _changes(folder: Path, epochs: int, rate: float, seed: int) -> dict[str, object]:
    """What is of one run alone."""
    return {
        "train.epochs": epochs,
        "train.learning_rate": rate,
        "run.seed": seed,
        "run.dir": str(folder / "runs" / f"{epochs}-{rate}-{seed}"),
    }


def _say(choice: tuple[int, float, int], results: dict[str, dict[str, float]]) -> None:
    epochs, rate, seed = choice
    said = ", ".join(
        f"{arm} {results[arm]['kl_teacher']:.4f} "
        f"(validation loss {results[arm]['validation_loss']:.4f})"
        for arm in ARMS
    )
    print(f"passes {epochs}, learning rate {rate}, seed {seed}: held-out KL {said}", flush=True)


def _at_best(
    found: dict, epochs: int, rates: tuple[float, ...], seeds: tuple[int, ...]
) -> dict[str, object]:
    best, values = {}, {}
    for arm in ARMS:
        means = {
            rate: statistics.mean(found[epochs, rate, s][arm]["validation_loss"] for s in seeds)
            for rate in rates
        }
        best[arm] = min(means, key=lambda rate: means[rate])
        if best[arm] in (rates[0], rates[-1]) and len(rates) > 1:
            print(
                f"passes {epochs}: the best rate of {arm}, {best[arm]}, is at an edge of the grid"
            )
        values[arm] = {m: [found[epochs, best[arm], s][arm][m] for s in seeds] for m in METRICS}
    gains = {
        m: [b - s for s, b in zip(values["student"][m], values["baseline"][m], strict=True)]
        for m in METRICS
    }
    teacher = found[epochs, rates[0], seeds[0]]["teacher"]["cross_entropy"]
    return {"learning_rate": best, "teacher_cross_entropy": teacher, **values, "gain": gains}


def _spread(values: list[float]) -> str:
    mean, half = interval(values)
    return f"{mean:.4f}" + ("" if half is None else f" ± {half:.4f}")


def main() -> None:
    """Parse the command line and do one of the two."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["prompts", "compare"])
    parser.add_argument("path", type=Path)
    parser.add_argument(
        "--tiny", action="store_true", help="seconds instead of an hour and more; shows nothing"
    )
    arguments = parser.parse_args()
    if arguments.what == "prompts":
        write_prompts(arguments.path)
        return
    environ["STILLROOM_ASSETS"] = str(ASSETS)  # the recipe asks for it
    outcome = compare(arguments.path, tiny=arguments.tiny)
    print("\n| passes | arm | learning rate | KL to teacher (nats) | cross-entropy (nats) |")
    print("| ---: | --- | ---: | ---: | ---: |")
    for epochs, result in outcome.items():
        for arm in ARMS:
            row = " | ".join(_spread(result[arm][m]) for m in METRICS)
            print(f"| {epochs} | {arm} | {result['learning_rate'][arm]} | {row} |")
        row = " | ".join(_spread(result["gain"][m]) for m in METRICS)
        print(f"| {epochs} | gain, paired by seed | | {row} |")
    print(json.dumps({"bench": "tinystories", "results": outcome}))


if __name__ == "__main__":
    main()
