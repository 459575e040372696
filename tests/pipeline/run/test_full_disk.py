"""A disk that is full in the middle of a stage.

The message is clear, the exit code is 1, and the next run finishes.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from kit import prompts, write_jsonl

NAMESPACE = ["unshare", "--map-root-user", "--mount"]
DRIVER = Path(__file__).parents[2] / "support" / "full_disk.py"


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which("unshare")
    or subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode != 0,
    reason="needs a mount namespace of its own",
)
def test_a_disk_that_is_full_in_every_stage(
    tmp_path: Path, tiny_llama: Callable[..., Path]
) -> None:
    teacher = tiny_llama("teacher", hidden_size=32)
    source = write_jsonl(tmp_path / "prompts.jsonl", prompts(24))
    disk = tmp_path / "disk"
    disk.mkdir()
    words = [*NAMESPACE, sys.executable, str(DRIVER), str(disk), str(teacher), str(source)]
    path = os.pathsep.join([str(DRIVER.parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        words, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, timeout=900
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for stage in ("data", "generate", "score", "train", "evaluate"):
        said = found[stage]["said"]
        assert found[stage]["code"] == 1, f"{stage}: {said}"
        assert "the disk is full. Free space and run the same command again" in said, (
            f"{stage}: {said}"
        )
        assert "Traceback" not in said, f"{stage}: {said}"
    assert set(found["results"]) >= {"teacher", "student"}
    assert found["verified"]
