"""Random kill -9 of a run that asks an endpoint.

It counts how many answers are lost, there twice, or paid for again.

    python tests/bench/endpoint.py [--kills 50] [--seed N] [--tiny]

The endpoint is a thread of this process (`tests/support/endpoint_server.py`): it counts the calls
for each prompt and takes 10 to 100 ms for one. Runs are processes forked from a server that has
loaded torch. Each has 8 calls at once, and runner and stage are killed at a random moment up to 1.5
seconds after the first call of this run. The next run goes on, until one ends by itself; then the
store is verified, and another one begins.

Rows lost: prompts without one at the end. Twice: texts that are there twice. Asked again: calls of
a killed run whose answers are not on disk; the endpoint's own counts at the end must say the same.
It prints a table, then one line of JSON.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from endpoint_server import Endpoint, answer_to, endpoint
from kit import prompts, write_jsonl, write_recipe
from loaded import Loaded
from running import alive, ours, start, until
from tiny_llama import save_tiny_llama

from stillroom.stages.recipe.load import load_recipe
from stillroom.stages.workers.answers import answers_dir, read_answers
from stillroom.storage.integrity.verify import verify
from stillroom.storage.store.store import Store

AT_ONCE = 8
LIFE_SECONDS = 1.5


@dataclass
class Tally:
    """What was counted."""

    kills: int = 0
    stores: int = 0
    rows: int = 0
    lost: int = 0
    twice: int = 0
    problems: int = 0
    calls: int = 0
    miscounted: int = 0
    """Calls that the endpoint counts and the runs do not know of, or the other way round."""
    again: list[int] = field(default_factory=list)


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--tiny", action="store_true", help="3 kills")
    words = parser.parse_args()
    kills, rows = (3, 60) if words.tiny else (words.kills, 400)
    rng, tally, began = random.Random(words.seed), Tally(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="stillroom-endpoint-") as folder:
        teacher = save_tiny_llama(Path(folder) / "teacher")
        while tally.kills < kills:
            tally.stores += 1
            place = Path(folder) / str(tally.stores)
            place.mkdir()
            with endpoint(delay=lambda number: rng.uniform(0.01, 0.1)) as served:
                _one_store(_recipe(place, teacher, served, rows), served, rng, tally, kills=kills)
    _print(tally, time.monotonic() - began)


def _recipe(folder: Path, teacher: Path, served: Endpoint, rows: int) -> Path:
    source = write_jsonl(folder / "prompts.jsonl", _different(rows))
    asked = {"engine": "openai", "base_url": served.url, "model": "tiny", "concurrency": AT_ONCE}
    alone = dict.fromkeys(("student", "score", "loss", "train", "evaluate"))
    return write_recipe(folder, teacher, source, generate=asked | {"max_tokens": 12}, **alone)


def _different(rows: int) -> list[dict[str, str]]:
    """Prompts of which no two are equal."""
    return [
        {"prompt": f"{row['prompt']}{' cat' * (n // 60)}"} for n, row in enumerate(prompts(rows))
    ]


def _one_store(
    recipe: Path, served: Endpoint, rng: random.Random, tally: Tally, *, kills: int
) -> None:
    """Runs, killed and followed by others, until every prompt has its row."""
    folder = answers_dir(recipe.parent / "run", load_recipe(recipe).generate)
    again = 0
    while True:
        asked, known = served.calls.total(), read_answers(folder).count
        run = start(recipe)
        if tally.kills < kills:
            _first_call(served, run, asked=asked)
            _sleep(rng.uniform(0, LIFE_SECONDS), run)
        else:
            run.wait()
        if run.poll() is not None:
            assert run.returncode == 0, run.errors()
            break
        _kill(run)
        tally.kills += 1
        sent = served.calls.total() - asked
        tally.again.append(sent - (read_answers(folder).count - known))
        again += tally.again[-1]
        assert 0 <= tally.again[-1] <= AT_ONCE, f"{tally.again[-1]} calls for nothing at one kill"
    _count(recipe, served, tally, again=again)


def _first_call(served: Endpoint, run: Loaded, *, asked: int) -> None:
    """Wait for the first call of a run, or for its end; before it `asked` had been sent."""
    until(lambda: served.calls.total() > asked or run.poll() is not None, "a call")


def _sleep(seconds: float, run: Loaded) -> None:
    """So long, or until the run has ended."""
    end = time.monotonic() + seconds
    while run.poll() is None and (left := end - time.monotonic()) > 0:
        time.sleep(min(left, 0.01))


def _kill(run: Loaded) -> None:
    stages = ours(run)
    run.kill()
    for stage in stages:
        stage.kill()
    run.wait()
    until(lambda: not any(map(alive, stages)), "their end")


def _count(recipe: Path, served: Endpoint, tally: Tally, *, again: int) -> None:
    """Compare the store with the prompts, and the calls with what the runs know of."""
    store = Store.open(recipe.parent / "store")
    asked = [json.loads(line)["prompt"] for line in (recipe.parent / "prompts.jsonl").open()]
    places: dict[str, list[int]] = {}
    for row in store.index("generations", ["key"]).to_pylist():
        places.setdefault(row["shard"], []).append(row["row"])
    found = list(store.rows("generations", places, ["prompt_key", "text"]))
    tally.rows += len(found)
    texts = Counter(row["text"] for row in found)
    tally.lost += (Counter(answer_to(prompt).strip() for prompt in asked) - texts).total()
    tally.twice += len(found) - len({row["prompt_key"] for row in found})
    tally.problems += len(verify(store).problems)
    tally.calls += served.calls.total()
    tally.miscounted += abs(served.calls.total() - len(asked) - again)


def _print(tally: Tally, seconds: float) -> None:
    result = {
        "kills": tally.kills,
        "stores": tally.stores,
        "rows": tally.rows,
        "rows_lost": tally.lost,
        "rows_twice": tally.twice,
        "problems": tally.problems,
        "calls": tally.calls,
        "asked_again": sum(tally.again),
        "asked_again_mean": round(sum(tally.again) / len(tally.again), 2),
        "asked_again_max": max(tally.again),
        "asked_again_bound": AT_ONCE,
        "calls_miscounted": tally.miscounted,
        "seconds": round(seconds, 1),
    }
    for name, value in result.items():
        sys.stdout.write(f"{name:<18} {value}\n")
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
