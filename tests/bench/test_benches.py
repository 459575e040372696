"""Benchmarks run one tiny step here, so that they cannot rot; their figures mean nothing at this size."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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


@pytest.mark.slow
def test_the_experiment_on_targets_runs_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    def run(*more: str) -> dict[str, Any]:
        words = [sys.executable, str(HERE / "targets.py"), str(tmp_path), "--tiny", *more]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=600)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    outcome = run()
    arms, points, zipf = outcome["arms"], outcome["angles"], outcome["estimators"]["zipf"]
    assert zipf["dropped tail, id 2"] == pytest.approx(0.1390, abs=5e-5)
    assert zipf["to label, id 1"] == pytest.approx(0.1408, abs=5e-5)
    assert zipf["distinct_ids"] == pytest.approx({"4": 3.94, "13": 12.29, "50": 43.03}, abs=5e-3)
    assert zipf["largest error of the mean, standard errors"] < 3
    for draw, ids in outcome["estimators"]["distinct_ids"].items():  # the closed form, against what is drawn
        assert outcome["estimators"]["measured"][f"{draw} 13"]["distinct_ids"] == pytest.approx(ids["13"], rel=0.05)
    assert (arms["ce"]["share"][0], arms["full"]["share"][0]) == pytest.approx((0, 100))
    assert arms["top3-drop"]["kept_mass"] == arms["top3-bucket"]["kept_mass"] < 1
    assert (arms["top3-drop"]["entries"], arms["ce"]["entries"]) == (3.0, None)
    assert list(points) == ["start", "middle", "end"]
    assert all(0 < angle < 180 for of in points.values() for angles in of["angle"].values() for angle in angles)
    assert (tmp_path / "arms.svg").read_text().startswith("<svg")
    assert (tmp_path / "angles.svg").read_text().startswith("<svg")
    assert run("--report")["arms"] == arms


@pytest.mark.assets
@pytest.mark.slow
def test_the_comparison_of_losses_on_sst2_runs(tmp_path: Path, assets: Path) -> None:
    words = [sys.executable, str(HERE / "sst2.py"), str(tmp_path), "--tiny", "--seeds", "0"]
    environment = os.environ | {"STILLROOM_ASSETS": str(assets), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout.splitlines()[-1])
    pipeline, study = outcome["pipeline"], outcome["study"]
    (teacher,), rows = pipeline["teacher"]["results"], study["rows"]
    assert (rows["train"], rows["validation"], rows["test"], teacher["rows"]) == (64, 20, 40, 40)
    assert study["teacher"]["test"]["accuracy"] == pytest.approx(teacher["accuracy"])
    assert {row["start"] for row in study["arms"]} == {"fresh", "fine-tuned"}
    # Distillation starts from the fine-tuned student that was saved.
    (tuned,) = study["fine_tuned"]
    for arm in ("labels", "forward_kl", "skew_forward_kl"):
        student = json.loads((tmp_path / "study" / f"{arm}-fine-tuned-0.002-0.json").read_text())
        assert student["before"]["test"] == pytest.approx(tuned)
    by_finding = {verdict["says"]: verdict["verdict"] for verdict in outcome["verdicts"]}
    assert by_finding["reverse KL is far worse than forward KL"] == "not run"
    assert by_finding["skew forward KL collapses"] != "not run"
    assert json.loads((tmp_path / "report.json").read_text())["verdicts"] == outcome["verdicts"]


@pytest.mark.slow
def test_the_equivalence_bench_runs() -> None:
    words = [sys.executable, str(HERE / "equivalence.py"), "--tiny", "--learning-rate", "5e-3"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout.splitlines()[-1])
    exact, ten, shifted = (runs[0]["loss_worst"] for runs in (*outcome["by_bits"].values(), outcome["shifted"]))
    assert exact < 1e-5 < ten < 1e-2 < shifted
