"""`doctor`: here, without hard links, on object stores, and where nothing can be written.

Broken libraries are found too.
"""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from kit import stillroom
from packaging.requirements import Requirement

from stillroom.pipeline.doctor import installed, libraries, place
from stillroom.pipeline.doctor.finding import Finding
from stillroom.storage.files.local import LocalFiles
from stillroom.storage.files.objects import ObjectFiles
from stillroom.storage.store.store import Store


def findings(address: str | Path) -> dict[str, Finding]:
    return {finding.name: finding for finding in place.look(str(address))}


def states(found: dict[str, Finding]) -> dict[str, str]:
    """But for how fast it is: these machines have other work too."""
    return {name: finding.state for name, finding in found.items() if name != "write speed"}


def test_here_all_is_well_and_nothing_is_left(tmp_path: Path) -> None:
    """The real command, once: on this machine a run is possible."""
    store = tmp_path / "not" / "there"
    shown = subprocess.run(
        [sys.executable, "-m", "stillroom", "doctor", str(store), "--json"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert shown.returncode == 0, shown.stdout
    *lines, last = shown.stdout.splitlines()
    found = {one["name"]: one for one in json.loads(last)["findings"]}
    assert len(lines) == len(found)
    assert {line.split()[0] for line in lines} <= {"ok", "warning"}
    told = {"Python", "packages", "machine", "store", "hard links", "put-if-absent", "write speed"}
    assert told <= set(found)
    assert {"free space", "torch", "GPU", "engine hf", "engine vllm"} <= set(found)
    assert found["packages"]["state"] == "ok"
    assert list(tmp_path.iterdir()) == []


def test_a_store_is_left_as_it_was(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store", create=True)
    before = sorted(tmp_path.rglob("*"))
    found = findings(store.root)
    assert set(states(found).values()) == {"ok"}
    assert sorted(tmp_path.rglob("*")) == before


def test_without_hard_links_no_run_is_possible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As exFAT says it, and some network filesystems."""

    def refuse(self: LocalFiles, temp: Path, final: Path) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM), str(temp))

    monkeypatch.setattr(LocalFiles, "_link", refuse)
    monkeypatch.setattr(libraries.Libraries, "look", lambda self: iter(()))
    done = stillroom("doctor", tmp_path / "store", "--json", expect=1)
    *_, last = done.stdout.splitlines()
    found = {one["name"]: one for one in json.loads(last)["findings"]}
    assert not json.loads(last)["ok"]
    assert found["hard links"]["state"] == "fault"
    assert "no hard links cannot hold a store" in found["hard links"]["found"]
    assert ".doctor" not in found["hard links"]["found"]
    assert "write speed" not in found
    assert list(tmp_path.iterdir()) == []


def test_links_that_overwrite_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A filesystem that lets everybody win: what no probe of one writer alone would show."""
    monkeypatch.setattr(LocalFiles, "exists", lambda self, name: False)
    monkeypatch.setattr(LocalFiles, "put_if_absent", _overwrite)
    found = findings(tmp_path)["put-if-absent"]
    assert found.state == "fault"
    assert "4 believe they have won" in found.found


def _overwrite(self: LocalFiles, name: str, data: bytes) -> bool:
    self.replace(name, data)
    return True


@pytest.mark.skipif(sys.platform != "linux", reason="needs mount namespaces")
def test_a_read_only_folder_says_what_still_works(tmp_path: Path) -> None:
    Store.open(tmp_path / "store", create=True)
    mount = (
        f"mount --bind {tmp_path}/store {tmp_path}/store && "
        f"mount -o remount,ro,bind {tmp_path}/store && "
    )
    script = tmp_path / "ask.py"
    script.write_text(
        "import sys\nfrom stillroom.pipeline.doctor.place import look\n"
        "for finding in look(sys.argv[1]):\n    print(finding.line())\n"
    )
    inner = f"{sys.executable} {script} {tmp_path}/store"
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount + inner], capture_output=True, text=True, timeout=60
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip("this machine gives tests no mount namespace")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("fault")]
    assert "read-only" in line
    assert "inspect, query, verify" in line


def test_other_files_are_no_place_for_a_store(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    found = findings(tmp_path)["store"]
    assert found.state == "fault"
    assert "STORE.json" in found.found
    assert "is a file" in stillroom("doctor", tmp_path / "thesis.tex", expect=2).stderr


def test_an_object_store_that_takes_conditions(s3: Any) -> None:
    found = findings(s3.root)
    assert states(found) == dict.fromkeys(("store", "put-if-absent", "temporary space"), "ok")
    assert "4.0 MiB" in found["write speed"].found
    assert list(ObjectFiles(s3.root).walk()) == []


def test_an_object_store_without_put_if_absent(s3: Any) -> None:
    s3.fault("ignore", times=10**6)
    found = findings(s3.root)
    assert found["put-if-absent"].state == "fault"
    assert "If-None-Match" in found["put-if-absent"].found
    s3.fault("")
    assert list(ObjectFiles(s3.root).walk()) == []


def test_a_bucket_that_is_not_there_and_a_driver_that_is_not(s3: Any) -> None:
    found = findings("s3://no-such-bucket-here/store")
    assert "fault" in states(found).values()
    odd = findings("odd://bucket/store")["store"]
    assert odd.state == "fault"


def test_a_service_that_never_answers_is_not_waited_for(
    s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, "ANSWER_SECONDS", 0.0)
    assert findings(s3.root)["service"].state == "fault"


GPU = {"version": "2.13.0", "cuda": "13.0", "gpus": ["NVIDIA H200"]}


@pytest.mark.parametrize(
    ("torch", "driver", "visible", "says"),
    [
        (GPU, ["H200"], None, ("ok", "torch sees 1: NVIDIA H200")),
        (GPU | {"gpus": []}, [], None, ("ok", "none")),
        (GPU | {"gpus": []}, ["H200"], "", ("warning", "CUDA_VISIBLE_DEVICES hides them")),
        (GPU | {"gpus": [], "cuda": None}, ["H200"], None, ("warning", "a build for CPUs")),
        (GPU | {"gpus": []}, ["H200"], None, ("warning", "the driver must be as new")),
    ],
)
def test_gpus_of_the_driver_and_of_torch(
    monkeypatch: pytest.MonkeyPatch, torch: Any, driver: list[str], visible: str | None, says: Any
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(libraries, "_driver", lambda: driver)
    found = list(libraries._torch(torch))[-1]
    assert (found.state, says[1] in found.line()) == (says[0], True)


def test_a_library_that_does_not_load_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {"name": "torch", "error": "OSError: libcudart.so.13: cannot open"}
    assert [f.state for f in libraries._torch(broken)] == ["fault"]
    engine = libraries._engine("vllm", "stillroom[vllm]", broken, True)
    assert (engine.state, "libcudart" in engine.line()) == ("warning", True)
    assert libraries._engine("vllm", "stillroom[vllm]", None, True).state == "warning"
    assert libraries._engine("vllm", "stillroom[vllm]", None, False).state == "ok"


def test_packages_are_compared_with_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "numpy>=2",
        "torch>=99",
        "nowhere-at-all>=1",
        "moto; extra == 's3'",
        "no-such; extra == 'gcs'",
    ]

    def look(python: str, *chosen: int) -> dict[str, Finding]:
        asked = installed.Asked(python, [Requirement(lines[n]) for n in chosen])
        monkeypatch.setattr(installed, "asked", lambda: asked)
        return {finding.name: finding for finding in installed.look()}

    found = look(">=3.11", 0, 1, 3, 4)
    assert states(found) == dict.fromkeys(("Python", "extra s3", "extra gcs"), "ok") | {
        "packages": "warning"
    }
    assert "(asked for: >=99)" in found["packages"].found
    assert "pip install 'stillroom[gcs]'" in found["extra gcs"].do
    found = look(">=9", 0, 2)
    assert states(found) == {"Python": "fault", "packages": "fault"}
    assert "nowhere-at-all >=1" in found["packages"].found


def test_a_checkout_asks_for_what_its_pyproject_does() -> None:
    found = installed.asked()
    names = {one.name for one in found.requirements if one.marker is None}
    assert {"torch", "transformers", "pyarrow", "packaging"} <= names
    extras = {
        extra
        for extra in installed.EXTRAS
        for one in found.requirements
        if f'"{extra}"' in str(one)
    }
    assert extras == set(installed.EXTRAS)
