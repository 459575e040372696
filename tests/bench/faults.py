"""Every command under every fault.

It is asked what is lost, what is made again, what the command says, and what it leaves behind.

    python tests/bench/faults.py DIR [--only [COLUMN][/FAULT] ...] [--tiny] [--show]

A cell is one command on a small real store, in a state just before it has work to do. The fault
strikes at a moment that matters (the second commit, the second checkpoint, a query at work), the
command ends, the fault is taken away, and the same command is run again. Lost: rows that were
there before, or that a commit record named, and cannot be read after. Made again: rows, steps,
files that were made more often than in a run without a fault. Right means: nothing lost, an exit
code that this fault may have, no traceback, no process left, the second time exit code 0, the
store whole, everything equal to what a run without a fault makes, and no file left that `vacuum`
does not take.

The commands are the real ones in processes of their own (`support/forked.py`), in a mount namespace
with a small disk. Cells that are in DIR already are not run again. It prints a table and what each
cell says, then one line of JSON.
"""

import argparse
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is read; a thread would not live on in a fork
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_TOKEN"] = "hf_nobody"
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from fault_cell import NOTHING, Watch, fresh_disk, in_child, run_cell
from fault_columns import COLUMNS, Column, Place, prepare
from fault_kinds import FAULTS, Fault
from fault_report import Cells, report, totals
from fault_servers import Bucket

S3_SERVER = Path(__file__).parents[1] / "support" / "s3_server.py"
NAMESPACE = ["unshare", "--map-root-user", "--mount"]
INSIDE = "STILLROOM_BENCH_NAMESPACE"
TRIES = 3
"""Of two processes the one that waits for the fault may find all work taken; the cell is run
again."""
TINY = [("data", "disk full")]
AHEAD = [
    *"pandas pyarrow.dataset pyarrow.json pyarrow.parquet duckdb datasets s3fs xxhash".split(),
    *"matplotlib.figure huggingface_hub.hf_api tensorboard.summary.writer".split(),
    *"transformers.models.llama.modeling_llama transformers.generation".split(),
    *(f"stillroom.stages.{name}.stage" for name in "data generate score train evaluate".split()),
    *(f"stillroom.stages.{name}" for name in "train.trainer models.students.saving".split()),
    *(f"stillroom.pipeline.{name}" for name in "run.runner publish.export".split()),
]
"""What commands and stages import, read once."""


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dir", type=Path)
    parser.add_argument("--only", nargs="+", default=[], metavar="[COLUMN][/FAULT]")
    parser.add_argument("--tiny", action="store_true", help="one cell")
    parser.add_argument("--show", action="store_true", help="the cells that are in DIR, no others")
    asked = parser.parse_args()
    if asked.show:
        show(Bench(asked.dir).cells())
        return
    if INSIDE not in os.environ:
        os.environ[INSIDE] = "yes"
        os.execvp(NAMESPACE[0], [*NAMESPACE, sys.executable, __file__, *sys.argv[1:]])
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # else commands go on without a terminal
    asked.dir.mkdir(parents=True, exist_ok=True)
    for name in () if asked.tiny else AHEAD:
        import_module(name)
    gc.freeze()  # or every fork would write to what it shares with this process
    bench = Bench(asked.dir.absolute())
    with bench.servers():
        for column, fault in chosen(asked.only, tiny=asked.tiny):
            verdict = bench.cell(column, fault)["verdict"]
            sys.stderr.write(f"{column:<24} {fault:<20} {verdict}\n")
    show(bench.cells())


def chosen(only: list[str], *, tiny: bool) -> list[tuple[str, str]]:
    """The cells that are asked for, in this order; without a wish row by row."""
    if tiny:
        return TINY
    wanted = [word.partition("/")[::2] for word in only] or [("", fault) for fault in FAULTS]
    return [
        (column, fault)
        for of_column, of_fault in wanted
        for fault in FAULTS
        for column in COLUMNS
        if of_column in ("", column) and of_fault in ("", fault)
    ]


class Bench:
    """The cells of one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._root = folder / "place"
        self._s3 = ""
        self._buckets = count()

    @contextmanager
    def servers(self) -> Iterator[None]:
        """S3, for as long as the block lasts."""
        self._root.mkdir(parents=True, exist_ok=True)
        server = subprocess.Popen(
            [sys.executable, S3_SERVER],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            assert server.stdout is not None
            self._s3 = f"http://127.0.0.1:{int(server.stdout.readline())}"
            yield
        finally:
            server.kill()
            server.communicate()

    def cell(self, column: str, fault: str) -> dict[str, Any]:
        """One cell, run if it was not yet."""
        kept = self._folder / f"{column}-{fault}.json".replace(" ", "_").replace(",", "")
        if not kept.exists():
            plain = {} if fault == NOTHING else self.cell(column, NOTHING)
            state = self._state(COLUMNS[column].state)
            bucket = Bucket(self._s3, f"cell-{os.getpid()}-{next(self._buckets)}")

            def run() -> None:
                place = Place(self._root)
                cell = run_cell(place, column, fault, state=state, bucket=bucket, plain=plain)
                kept.write_text(json.dumps(cell, indent=1))

            for _ in range(TRIES):
                try:
                    in_child(run)
                except AssertionError:
                    return {"verdict": "THE BENCH FAILED"}
                if json.loads(kept.read_text()).get("verdict") != "NOT HIT":
                    break
        found: dict[str, Any] = json.loads(kept.read_text())
        return found

    def _state(self, column: str) -> Path:
        """The state after a column, which is made if it is not there, after those before it."""
        folder = self._folder / "states" / (column or "nothing")
        if folder.exists():
            return folder
        before = None if not column else self._state(COLUMNS[column].state)

        def make() -> None:
            fresh_disk(self._root, before)
            if column:
                undisturbed(Place(self._root), COLUMNS[column])
            else:
                in_child(partial(prepare, Place(self._root)))
            shutil.copytree(self._root, folder, symlinks=True)

        in_child(make)
        return folder

    def cells(self) -> Cells:
        """All cells there are, by column and fault."""
        found: Cells = {}
        for path in self._folder.glob("*.json"):
            cell = json.loads(path.read_text())
            if cell["fault"] != NOTHING:
                found.setdefault(cell["column"], {})[cell["fault"]] = cell
        return {column: found[column] for column in COLUMNS if column in found}


def undisturbed(place: Place, column: Column) -> None:
    """The command to its end."""
    watch = Watch(place, column, {})
    with watch.begun(Fault(codes=(0,)), armed=False):
        assert watch.end() == 0, watch.said()


def show(cells: Cells) -> None:
    """Print the tables, and the JSON line."""
    sys.stdout.write(f"{report(cells, FAULTS)}\n{json.dumps(totals(cells))}\n")


if __name__ == "__main__":
    main()
