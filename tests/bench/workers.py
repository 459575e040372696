"""How much faster are two workers than one?

The real command line in processes of its own (`support/loaded.py`) on one store, a tiny teacher,
one thread each.

    python tests/bench/workers.py [--tiny] [--rows N] [--rounds N] [--engine hf]

Each round does the same prompts three times: by one worker; by two workers of one run, which share
its store (`compute.workers`); and, as a control, by two that share nothing, each a run on a store
and all prompts of its own, which is what the machine can do at best. The rate is rows over the time
from the moment when every worker has committed to the last commit of all: so loading is out, and
the end, when workers run out of blocks of their own, is in. Of workers apart it is the sum of their
own rates. Rows made twice are counted where they are made. CPU time per committed row, from a
worker's first row to its last, says what sharing costs also where other processes take a part of
the machine.
"""

import json
import os
import statistics
import sys
import tempfile
from argparse import ArgumentParser
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from kit import prompts, stillroom, write_jsonl, write_recipe
from running import at_worker_start, start
from tiny_llama import save_tiny_llama

from stillroom.storage.store.store import Store

NOTED = """
    import time
    from stillroom.stages.generate.stage import _Writing
    keep = _Writing._keep
    def noted(self, completion):
        with open({path!r}, "a") as file:
            print(os.getpid(), time.process_time(), file=file)
        keep(self, completion)
    _Writing._keep = noted
"""


def work(folder: Path, recipes: list[Path], counted: Path, *, workers: int) -> None:
    """A run of so many workers for each recipe named, all at once; ends when all have."""
    site = at_worker_start(folder, NOTED.format(path=str(counted)))
    words = ("--only", "generate", "--quiet", "--set", f"compute.workers={workers}")
    started = [start(recipe, *words, PYTHONPATH=site) for recipe in recipes]
    for process in started:
        if process.wait():
            raise SystemExit(f"a run ended with {process.returncode}: {process.errors()}")


def commits(store: Path) -> list[tuple[float, str, int]]:
    """(time, writer, rows) of each commit; the time is that of the record's file."""
    opened = Store.open(store)
    return [
        (
            (store / "commits" / "generations" / f"{c.seq:08d}.json").stat().st_mtime,
            c.writer,
            c.shard.rows,
        )
        for c in opened.commits("generations")
    ]


def rate(store: Path) -> tuple[float, dict[str, int]]:
    """Rows per second once every writer has committed, and the rows of each writer.

    Where no row came after that, it is over all.
    """
    done = sorted(commits(store))
    shares: dict[str, int] = {}
    for _, writer, rows in done:
        shares[writer] = shares.get(writer, 0) + rows
    began = max(min(t for t, w, _ in done if w == writer) for writer in shares)
    if began == done[-1][0]:
        began = done[0][0]
    return sum(rows for t, _, rows in done if t > began) / (done[-1][0] - began), shares


def cpu_seconds(made: Path) -> float:
    """CPU time of all workers, each from its first row to its last."""
    times: dict[str, list[float]] = {}
    for line in made.read_text().splitlines():
        process, seconds = line.split()
        times.setdefault(process, []).append(float(seconds))
    return sum(max(seconds) - min(seconds) for seconds in times.values())


def one_round(
    folder: Path, teacher: Path, source: Path, settings: dict[str, object]
) -> dict[str, object]:
    """The three ways, each in a fresh store."""
    result: dict[str, object] = {}
    for way, count, stores in (("one", 1, 1), ("shared", 2, 1), ("apart", 2, 2)):
        recipes = []
        for number in range(stores):
            place = folder / f"{way}-{number}"
            place.mkdir(parents=True)
            recipes.append(
                write_recipe(place, teacher, source, generate=settings, storage=storage(place))
            )
            stillroom("run", recipes[-1], "--only", "data")
        made = folder / f"{way}-made"
        work(folder / f"{way}-site", recipes, made, workers=count // stores)
        rates = [rate(recipe.parent / "store") for recipe in recipes]
        shares = sorted((rows for _, writers in rates for rows in writers.values()), reverse=True)
        rows = sum(shares)
        result[way] = {
            "rows_per_second": round(sum(per_second for per_second, _ in rates), 2),
            "rows": rows,
            "shares": shares,
            "rows_redone": len(made.read_text().splitlines()) - rows,
            "cpu_ms_per_row": round(1000 * cpu_seconds(made) / rows, 3),
        }
    return result


def storage(folder: Path) -> dict[str, object]:
    """Where the store is; commits small enough to see a rate."""
    return {"dir": str(folder / "store"), "commit_rows": 32}


def median(rounds: list[dict[str, object]], way: str, what: str = "rows_per_second") -> float:
    """The median of a way, over the rounds."""
    return statistics.median(r[way][what] for r in rounds)


def main() -> None:
    """Parse the command line, run, print."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tiny", action="store_true", help="seconds instead of minutes; shows nothing"
    )
    parser.add_argument("--rows", type=int, default=2400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engine", default="hf")
    arguments = parser.parse_args()
    count, rounds = (96, 1) if arguments.tiny else (arguments.rows, arguments.rounds)
    settings: dict[str, object] = {
        "engine": arguments.engine,
        "max_tokens": 8 if arguments.tiny else 48,
    }
    settings["engine_args"] = (
        {"batch_size": 16} if arguments.engine == "hf" else {"max_num_seqs": 16}
    )
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        teacher = save_tiny_llama(
            folder / "teacher", hidden_size=64, num_hidden_layers=4, eos_token_id=None
        )
        source = write_jsonl(folder / "prompts.jsonl", prompts(count))
        for number in range(rounds):
            load = round(os.getloadavg()[0], 1)
            found.append(
                one_round(folder / str(number), teacher, source, settings) | {"load_before": load}
            )
            print(f"round {number}: {json.dumps(found[-1])}", file=sys.stderr, flush=True)
    one, shared, apart = (median(found, way) for way in ("one", "shared", "apart"))
    print("| workers | rows/s | times one worker | CPU ms per row | rows made twice, each round |")
    print("| --- | ---: | ---: | ---: | --- |")
    for way, per_second in (("one", one), ("shared", shared), ("apart", apart)):
        redone = ", ".join(str(r[way]["rows_redone"]) for r in found)
        cpu = median(found, way, "cpu_ms_per_row")
        print(f"| {way} | {per_second:.1f} | {per_second / one:.2f} | {cpu:.2f} | {redone} |")
    ratios = {
        "speedup": round(shared / one, 3),
        "of_what_the_machine_can": round(shared / apart, 3),
    }
    ratios["cpu_per_row"] = round(
        median(found, "shared", "cpu_ms_per_row") / median(found, "one", "cpu_ms_per_row"), 3
    )
    print(
        json.dumps(
            {
                "bench": "workers",
                "engine": arguments.engine,
                "rows": count,
                **ratios,
                "rounds": found,
            }
        )
    )


if __name__ == "__main__":
    main()
