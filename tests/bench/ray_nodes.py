"""What does a lost node cost: `stillroom launch --on ray` beside Ray Data with its checkpoints?

    python tests/bench/ray_nodes.py [--tiny] [--rows N] [--only stillroom data]

Two local nodes of Ray (`ray.cluster_utils.Cluster`), one with two actors and one with one, write
the same completions with the same tiny teacher, greedily, in batches of 32. When two fifths of the
rows are made, and some of them by each actor, all processes of the node with two actors die by
SIGKILL, its workers too, and nothing comes in its place.

The recipe has no student, so that nothing is trained. `data` is Ray Data: `map_batches` with three
actors and `CheckpointConfig` over Parquet files of a hundredth of the rows each, written as
Parquet. Each worker notes every row that it makes, as it is made. The seconds to the first row are
from the start of the command, so they hold the start of Python and Ray's actors, not the start of
the cluster. Memory is the sum of the proportional set sizes of all processes of the cluster and the
driver, looked at each second. Needs `ray[data]` beside Stillroom.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

os.environ |= {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_worker_niceness": "0",  # else 15, and whatever else runs here goes first
    "OMP_NUM_THREADS": "1",
}

import psutil
from kit import write_jsonl, write_recipe
from running import at_worker_start
from tiny_llama import save_tiny_llama

WORDS = "cat dog tree mat big small red blue happy under on and then ran sat".split()
BATCH, TOKENS = 32, 8
BLOCKS = 100
"""Of Ray Data: files of prompts, and what it is asked to cut them into."""
NOTED = """
    from stillroom.stages.engines.hf import HfEngine
    completion = HfEngine._completion
    def noted(self, request, *arguments):
        with open({path!r}, "a") as file:
            file.write(f"{{request.seed}} {{os.getpid()}}\\n")
        return completion(self, request, *arguments)
    HfEngine._completion = noted
"""
WAYS = ("stillroom", "data")


def texts(count: int) -> list[dict[str, Any]]:
    """As many different prompts."""
    return [
        {"prompt": " ".join(WORDS[number // 15**place % 15] for place in range(5))}
        for number in range(count)
    ]


class Writing:
    """What an actor of Ray Data does: the same model, batch after batch."""

    def __init__(self, teacher: str, made: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(1)
        self._made = made
        self._tokenizer = AutoTokenizer.from_pretrained(teacher, padding_side="left")
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token_id = 0
        self._model = AutoModelForCausalLM.from_pretrained(teacher).eval()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Completions of a batch."""
        given = self._tokenizer(list(batch["prompt"]), return_tensors="pt", padding=True)
        given.pop("token_type_ids", None)
        out = self._model.generate(**given, max_new_tokens=TOKENS, do_sample=False)
        new = out[:, given["input_ids"].shape[1] :]
        with open(self._made, "a") as file:
            file.write("".join(f"{number} {os.getpid()}\n" for number in batch["id"]))
        return {"id": batch["id"], "completion": self._tokenizer.batch_decode(new)}


def ray_data(folder: Path, address: str) -> None:
    """The driver of Ray Data, in a process of its own."""
    import ray
    from ray.data.checkpoint import CheckpointConfig

    ray.init(address=address, _node_ip_address="127.0.0.1", log_to_driver=False)
    context = ray.data.DataContext.get_current()
    context.checkpoint_config = CheckpointConfig(
        id_column="id",
        checkpoint_path=str(folder / "checkpoint"),
        delete_checkpoint_on_success=False,
    )
    # It reads so little as one block, whatever `override_num_blocks` says, and one actor has all
    # the work.
    rows = ray.data.read_parquet(str(folder / "prompts")).repartition(BLOCKS)
    written = rows.map_batches(
        Writing,
        fn_constructor_args=(str(folder / "teacher"), str(folder / "made")),
        batch_size=BATCH,
        compute=ray.data.ActorPoolStrategy(size=3),
        num_cpus=1,
        resources={"slot": 1},
    )
    written.write_parquet(str(folder / "written"))


@contextmanager
def cluster(way: str) -> Iterator[Any]:
    """A head without a place for an actor, a node with two and a node with one.

    The cluster, the node with two.

    Ray Data reads and writes in tasks beside its actors: each node has one CPU more for them, else
    its actors take all and nothing is ever read.
    """
    from ray.cluster_utils import Cluster

    scratch = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # its sockets' names must be short
    os.environ["RAY_TMPDIR"] = scratch
    (Path(scratch) / "ray").mkdir()
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 200 << 20}
    common = {"node_ip_address": "127.0.0.1", "object_store_memory": 200 << 20}
    nodes = Cluster(initialize_head=True, head_node_args=head | common)
    try:
        more = int(way == "data")
        two = nodes.add_node(num_cpus=2 + more, resources={"slot": 2}, **common)
        nodes.add_node(num_cpus=1 + more, resources={"slot": 1}, **common)
        nodes.wait_for_nodes()
        yield nodes, two
    finally:
        nodes.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)


def kill_node(nodes: Any, node: Any) -> None:
    """As a machine dies: no process of it does anything any more."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    # The group of each: what a worker has started is below it, in sessions of its own.
    theirs = [*raylet.children(recursive=True)]
    for process in [*theirs, raylet]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    nodes.remove_node(node, allow_graceful=False)


class Memory(threading.Thread):
    """The largest sum of what all processes below this one had."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.over = 0, threading.Event()

    def run(self) -> None:
        """Look each second."""
        while not self.over.wait(1.0):
            self.peak = max(self.peak, sum(map(_share, psutil.Process().children(recursive=True))))


def _share(process: psutil.Process) -> int:
    with suppress(OSError, ValueError):
        for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    return 0


def noted(made: Path, what: int = 0) -> Counter[str]:
    """Row (or, as the second of a line, process) -> how often it was made."""
    lines = made.read_text().splitlines() if made.exists() else []
    # The last line may be half there.
    return Counter(words[what] for line in lines if len(words := line.split()) == 2)


def begin(way: str, folder: Path, address: str) -> subprocess.Popen[bytes]:
    """The driver's command."""
    if way == "data":
        words = [__file__, "--driver", str(folder), "--address", address]
    else:
        words = ["-m", "stillroom", "launch", str(folder / "recipe.yaml"), "--on", "ray"]
        words += ["--workers", "3", "--gpus", "0"]
    log = (folder / "driver.log").open("ab")
    return subprocess.Popen(
        [sys.executable, *words],
        env=os.environ | {"RAY_ADDRESS": address},
        stdout=log,
        stderr=log,
        cwd=folder,
    )


def until(condition: Any, process: subprocess.Popen[bytes], folder: Path) -> None:
    """Look again and again; a driver that has ended ends the bench."""
    while not condition():
        if process.poll() is not None:
            raise SystemExit((folder / "driver.log").read_text()[-3000:])
        time.sleep(0.1)


def one(way: str, folder: Path, rows: int) -> dict[str, Any]:
    """A way, in a folder of its own."""
    folder.mkdir()
    save_tiny_llama(folder / "teacher", hidden_size=64, num_hidden_layers=4, eos_token_id=None)
    records = texts(rows)
    source = write_jsonl(folder / "prompts.jsonl", records)
    generate = {"engine": "hf", "temperature": 0.0, "max_tokens": TOKENS}
    write_recipe(
        folder,
        folder / "teacher",
        source,
        generate=generate | {"engine_args": {"batch_size": BATCH}},
        storage={"dir": str(folder / "store")},
        data={"source": str(source), "format": "prompt", "holdout": 4},
        **dict.fromkeys(("student", "score", "loss", "train", "evaluate")),
    )
    if way == "data":
        _parquet(folder / "prompts", records)
    site = at_worker_start(folder / "site", NOTED.format(path=str(folder / "made")))
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(site.split(os.pathsep)))
    made = folder / "made"
    memory = Memory()
    memory.start()
    found: dict[str, Any] = {"way": way, "rows": rows}
    with cluster(way) as (nodes, two):
        began = time.monotonic()
        driver = begin(way, folder, nodes.address)
        until(made.exists, driver, folder)
        found["seconds_to_first_row"] = round(time.monotonic() - began, 1)
        until(lambda: noted(made).total() >= 2 * rows // 5, driver, folder)
        if rows >= 1000:  # of fewer, some actors make all before the last one is there
            until(lambda: len(noted(made, 1)) == 3, driver, folder)
        found["made_before"] = noted(made).total()
        kill_node(nodes, two)
        code = driver.wait()
    memory.over.set()
    if code:
        raise SystemExit((folder / "driver.log").read_text()[-3000:])
    count = noted(made)
    return found | {
        "seconds": round(time.monotonic() - began, 1),
        "distinct_rows": len(count),
        "made_again": count.total() - len(count),
        "in_the_end": stored(way, folder),
        "peak_mb": memory.peak >> 20,
        "load": round(os.getloadavg()[0], 1),
    }


def _parquet(folder: Path, records: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    numbered = [record | {"id": number} for number, record in enumerate(records)]
    size = max(BATCH, len(records) // BLOCKS)
    for first in range(0, len(records), size):
        table = pa.Table.from_pylist(numbered[first : first + size])
        pq.write_table(table, folder / f"{first:08d}.parquet")


def stored(way: str, folder: Path) -> dict[str, int]:
    """Rows that are there in the end, and how many different ones."""
    if way == "data":
        import pyarrow.parquet as pq

        ids = [
            number
            for path in (folder / "written").rglob("*.parquet")
            for number in pq.read_table(path)["id"].to_pylist()
        ]
        return {"rows": len(ids), "different": len(set(ids))}
    from stillroom.storage.store.store import Store

    store = Store.open(folder / "store")
    keys = store.index("generations", ["key"])["key"].to_pylist()
    return {"rows": len(keys), "different": len(set(keys))}


def main() -> None:
    """Parse the command line, run, print."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tiny", action="store_true", help="minutes instead of half an hour; shows nothing"
    )
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--only", nargs="*", default=WAYS, choices=WAYS)
    parser.add_argument("--driver", type=Path, help="be the driver of Ray Data in this folder")
    parser.add_argument("--address", default="")
    arguments = parser.parse_args()
    if arguments.driver:
        ray_data(arguments.driver, arguments.address)
        return
    rows = 600 if arguments.tiny else arguments.rows
    found = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        for way in arguments.only:
            found.append(one(way, Path(scratch) / way, rows))
            print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    print("| | rows made again | in the end, different | s to the first row | s | peak MB |")
    print("| --- | ---: | --- | ---: | ---: | ---: |")
    for each in found:
        there = each["in_the_end"]
        print(
            f"| {each['way']} | {each['made_again']} | {there['rows']}, {there['different']} "
            f"| {each['seconds_to_first_row']} | {each['seconds']} | {each['peak_mb']} |"
        )
    print(json.dumps({"bench": "ray_nodes", "rows": rows, "found": found}))


if __name__ == "__main__":
    main()
