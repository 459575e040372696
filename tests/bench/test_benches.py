"""Benchmarks run one tiny step here, so that they cannot rot; their figures mean nothing at this size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.assets
@pytest.mark.slow
def test_the_tinystories_comparison_runs(tmp_path: Path, assets: Path) -> None:
    words = [sys.executable, str(HERE / "tinystories.py"), "compare", str(tmp_path), "--tiny"]
    environment = os.environ | {"STILLROOM_ASSETS": str(assets)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout.splitlines()[-1])
    result = outcome["results"]["1"]
    assert result["gain"]["kl_teacher"][0] == pytest.approx(
        result["baseline"]["kl_teacher"][0] - result["student"]["kl_teacher"][0]
    )


def test_thirty_kills_lose_nothing(tmp_path: Path) -> None:
    words = [sys.executable, str(HERE / "kills.py"), "--tiny"]
    done = subprocess.run(
        words, capture_output=True, text=True, env=os.environ | {"TMPDIR": str(tmp_path)}, timeout=300
    )
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert outcome["kills"] >= 30
    assert (outcome["rows_lost"], outcome["rows_duplicated"], outcome["problems"]) == (0, 0, 0)
    assert outcome["rows_redone_max"] <= outcome["rows_redone_bound"]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_rate_distortion_curves_run(tmp_path: Path) -> None:
    words = [sys.executable, str(HERE / "rate_distortion.py"), str(tmp_path), "--tiny"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout.splitlines()[-1])
    families = {point["family"] for point in outcome["points"]}
    assert families == {"topk", "topp", "threshold", "multinomial", "systematic"}
    top = next(p for p in outcome["points"] if (p["family"], p["setting"], p["bits"]) == ("topk", "K=50", 10))
    assert top["kl_bias"] < 0 < top["bytes"]  # a bucket's KL is a lower bound
    assert (tmp_path / "rate-distortion.svg").read_text().startswith("<svg")


def test_the_commit_bench_runs() -> None:
    done = subprocess.run(
        [sys.executable, str(HERE / "commit.py"), "--tiny"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (measured,) = json.loads(done.stdout.splitlines()[-1])["by_entries"].values()
    assert measured["tokens"] == 8 * 512
    steps = measured["milliseconds"]
    assert all(steps[name] > 0 for name in ("check rows", "encode", "fsync", "sha256", "read back", "record"))


@pytest.mark.slow
def test_the_loader_bench_runs() -> None:
    words = [sys.executable, str(HERE / "loader.py"), "--tiny"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert set(outcome["speed"]) == {"rows", "tokens", "repeats", "stillroom", "datasets"}
    assert outcome["resume"]["footers_opened"] == outcome["resume"]["footers_needed"]


@pytest.mark.slow
def test_the_workers_bench_runs() -> None:
    words = [sys.executable, str(HERE / "workers.py"), "--tiny"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (measured,) = json.loads(done.stdout.splitlines()[-1])["rounds"]
    assert sum(measured["one"]["shares"]) == sum(measured["shared"]["shares"]) == 96
    assert sum(measured["apart"]["shares"]) == 2 * 96
    assert measured["one"]["rows_redone"] == measured["apart"]["rows_redone"] == 0


@pytest.mark.slow
def test_the_plan_bench_runs(tmp_path: Path) -> None:
    words = [sys.executable, str(HERE / "plan.py"), str(tmp_path), "--tiny"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    stages = json.loads(done.stdout.splitlines()[-1])["stages"]
    assert stages["generate"] == {"planned": 3000, "committed": 1800, "pending": 1200}
