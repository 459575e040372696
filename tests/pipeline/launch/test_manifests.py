"""The manifests of the guide: what their tools' own checks miss, and their command lines.

The product reads those command lines.
"""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from stillroom.pipeline.cli.main import app

GUIDE = Path(__file__).parents[3] / "pipeline" / "guides" / "many-machines.md"
TEXT = GUIDE.read_text()


def manifest(name: str) -> Any:
    (text,) = re.findall(rf'^```yml title="{name}"\n(.*?)^```$', TEXT, re.MULTILINE | re.DOTALL)
    return yaml.safe_load(text)


def reads(words: list[str]) -> dict[str, Any]:
    """The options of a command line, as the product's own parser reads them; nothing is run."""
    assert words[0] == "stillroom"
    command = typer.main.get_command(app).commands[words[1]]  # type: ignore[attr-defined]
    found: dict[str, Any] = command.make_context(words[1], words[2:]).params
    return found


def test_the_indexed_job_is_an_array_whose_workers_come_back() -> None:
    job = manifest("workers.k8s.yml")
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"]
    # Kubernetes takes a limit for each index with this policy alone.
    assert (spec["backoffLimitPerIndex"] > 0, pod["restartPolicy"]) == (True, "Never")
    assert pod["terminationGracePeriodSeconds"] > 30
    (container,) = pod["containers"]
    found = reads(container["command"])
    assert (found["worker"], found["until"]) == (True, "score")
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}


def test_the_managed_job_is_one_worker_on_a_store_that_outlives_it() -> None:
    task = manifest("worker.sky.yml")
    *_, line = task["run"].strip().splitlines()
    found = reads(shlex.split(line))
    assert (found["worker"], found["until"]) == (True, "score")
    assert any(one.startswith("storage.dir=s3://") for one in found["overrides"])
    assert task["resources"]["job_recovery"]["max_restarts_on_errors"] > 0


@pytest.mark.parametrize("line", sorted(set(re.findall(r"`(stillroom [^`]+)`", TEXT))))
def test_commands_in_the_text_are_read(line: str) -> None:
    reads(shlex.split(line))
