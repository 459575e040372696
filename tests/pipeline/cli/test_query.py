"""`query`: a signal ends it within a second.

It holds no more memory than it may, and makes no more rows than it shows.
"""

import json
import signal
import subprocess
import threading
from pathlib import Path

import psutil
import pytest
from kit import ENVIRONMENT, command, last_json, stillroom
from running import until

from stillroom.stages.workers.job import StopFlag
from stillroom.storage.errors import Stopped, UsageError
from stillroom.storage.store.limits import SETTINGS
from stillroom.storage.store.sql import first_rows, query
from stillroom.storage.store.store import Store

CROSS = (
    "SELECT count(*) FROM range(3000000) a, range(100000) b WHERE hash(a.range, b.range) % 7 = 3"
)
STUCK = "SELECT length(repeat('x', 1500000000))"  # one value: DuckDB does not look up from it


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return Path(Store.open(tmp_path / "store", create=True).root)


def computes(process: psutil.Process) -> bool:
    """Whether its CPU time is that of the statement.

    That is more than Python and DuckDB need to begin with.
    """
    return any(thread.user_time > 0.3 for thread in process.threads()[1:])


@pytest.mark.parametrize(
    ("number", "statement"),
    [
        (signal.SIGINT, CROSS),
        (signal.SIGHUP, CROSS),
        (signal.SIGTERM, STUCK),
    ],
    ids=["INT", "HUP", "TERM in one value"],
)
def test_a_signal_ends_a_query(store: Path, number: signal.Signals, statement: str) -> None:
    process = subprocess.Popen(
        command("query", store, statement, "--json"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    try:
        until(lambda: computes(psutil.Process(process.pid)), "the statement")
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err == (
        "error: stopped by a signal; what is finished is kept. Run the same command again.\n"
    )
    assert json.loads(out)["exit_code"] == 130


def test_a_stop_flag_ends_a_statement_of_a_stage(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flag's handler raises nothing.

    The books' and the recipe's SQL (`select.where`) end all the same.
    """
    flag, opened = StopFlag(), Store.open(store)
    before = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        flag.listen()

        def send_when_it_computes() -> None:
            began = psutil.Process().cpu_times().user
            until(lambda: psutil.Process().cpu_times().user > began + 0.5, "the statement")
            signal.raise_signal(signal.SIGTERM)

        threading.Thread(target=send_when_it_computes, daemon=True).start()
        with pytest.raises(Stopped):
            query(opened, CROSS)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    with pytest.raises(Stopped):
        flag.check()


def test_only_the_rows_that_are_shown_are_made(store: Path) -> None:
    """The result is one that no memory holds."""
    endless = "SELECT range AS n FROM range(100000000000)"
    shown = stillroom("query", store, endless, "--rows", 3, "--json")
    assert "(the first 3 rows; there are more, see --rows)" in shown.stdout
    assert last_json(shown) == {"rows": [{"n": 0}, {"n": 1}, {"n": 2}], "complete": False}
    all_of_it = last_json(stillroom("query", store, "SELECT range AS n FROM range(2)", "--json"))
    assert all_of_it == {"rows": [{"n": 0}, {"n": 1}], "complete": True}
    none, complete = first_rows(Store.open(store), "SELECT key FROM prompts", most=1)
    assert (none.num_rows, none.column_names, complete) == (0, ["key"], True)
    ordered = "SELECT range AS n FROM range(200000) ORDER BY n DESC"
    rows, _ = first_rows(Store.open(store), ordered, most=2)
    assert rows["n"].to_pylist() == [199999, 199998]


@pytest.mark.parametrize(
    ("variable", "statement"),
    [
        ("STILLROOM_SQL_MEMORY", "SELECT list(range) FROM range(4000000)"),
        ("STILLROOM_SQL_DISK", "SELECT range AS n FROM range(4000000) ORDER BY hash(n)"),
    ],
)
def test_what_a_query_may_hold_is_bounded_and_settable(
    store: Path, monkeypatch: pytest.MonkeyPatch, variable: str, statement: str
) -> None:
    monkeypatch.setenv("STILLROOM_SQL_MEMORY", "30MB")
    monkeypatch.setenv("STILLROOM_SQL_DISK", "1MB")
    says = "Out of Memory.*STILLROOM_SQL_MEMORY and STILLROOM_SQL_DISK"
    with pytest.raises(UsageError, match=says):
        query(Store.open(store), statement)
    monkeypatch.setenv(variable, "400MB")
    assert query(Store.open(store), f"SELECT count(*) FROM ({statement})").num_rows == 1
    monkeypatch.setenv(variable, "a lot")
    with pytest.raises(UsageError, match=f"{variable}: 'a lot' is no size"):
        query(Store.open(store), "SELECT 1")


def test_the_limits_are_those_that_duckdb_has(store: Path) -> None:
    names = [f"current_setting('{setting}') AS {setting}" for setting in SETTINGS.values()]
    (found,) = query(Store.open(store), f"SELECT {', '.join(names)}").to_pylist()
    assert found == {"memory_limit": "1.8 GiB", "max_temp_directory_size": "18.6 GiB"}


def test_what_cannot_be_put_on_disk_is_no_damaged_shard(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file in the way stands for a full disk."""
    monkeypatch.setenv("STILLROOM_SQL_MEMORY", "20MB")
    (store / "cache").write_text("")
    spills = "SELECT count(DISTINCT md5(range::VARCHAR)) FROM range(500000)"
    done = stillroom("query", store, spills, expect=1)
    assert "Free space" in done.stderr
    assert str(store / "cache") in done.stderr
