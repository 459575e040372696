"""Benchmarks run one tiny step here, so that they cannot rot.

Their figures mean nothing at this size.
"""

import importlib.util
import io
import json
import os
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

HERE = Path(__file__).parent


def bench(name: str, *words: object) -> tuple[dict[str, Any], str]:
    """A bench run to its end in this process, which has torch already.

    It gives the JSON of the last line, and all that was printed.
    """
    script = str(HERE / f"{name}.py")
    printed = io.StringIO()
    with (
        patch.object(sys, "argv", [script, *map(str, words)]),
        patch.object(sys, "path", [str(HERE), *sys.path]),
        redirect_stdout(printed),
    ):
        runpy.run_path(script, run_name="__main__")
    said = printed.getvalue()
    return json.loads(said.splitlines()[-1]), said


@pytest.mark.assets
@pytest.mark.slow
def test_the_tinystories_comparison_runs(
    tmp_path: Path, assets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STILLROOM_ASSETS", str(assets))
    outcome, _ = bench("tinystories", "compare", tmp_path, "--tiny")
    result = outcome["results"]["1"]
    assert result["gain"]["kl_teacher"][0] == pytest.approx(
        result["baseline"]["kl_teacher"][0] - result["student"]["kl_teacher"][0]
    )


@pytest.mark.assets
@pytest.mark.slow
def test_the_comparison_of_turns_runs(
    tmp_path: Path, assets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STILLROOM_ASSETS", str(assets))
    outcome, _ = bench("turns", tmp_path, "--tiny")
    (every,), (last,) = (outcome["results"]["arms"][t]["cross_entropy"] for t in ("all", "last"))
    assert outcome["results"]["gain"] == [pytest.approx(last - every)]


@pytest.mark.assets
@pytest.mark.slow
def test_the_comparison_of_two_teachers_runs(
    tmp_path: Path, assets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STILLROOM_ASSETS", str(assets))
    outcome, _ = bench("teachers", tmp_path, "--tiny")
    found = outcome["results"]
    assert set(found["gains"]) == {"stories", "code", "unrouted", "routed"}
    (both,), (alone,) = (found["gains"][student]["code"] for student in ("routed", "code"))
    assert found["kept"]["routed"]["code"] == [pytest.approx(both / alone)]


def test_three_kills_of_a_run_that_asks_an_endpoint_lose_nothing(tmp_path: Path) -> None:
    words = [sys.executable, str(HERE / "endpoint.py"), "--tiny"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout.splitlines()[-1])
    names = ("rows_lost", "rows_twice", "problems", "calls_miscounted")
    assert {name: outcome[name] for name in names} == dict.fromkeys(names, 0)
    assert outcome["kills"] == 3
    assert outcome["asked_again_max"] <= 8


@pytest.mark.slow
def test_a_rank_that_is_killed_loses_no_sample() -> None:
    words = [sys.executable, str(HERE / "rank_kills.py"), "--tiny"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert (outcome["kills"], outcome["samples_missing"], outcome["samples_twice"]) == (1, 0, 0)
    assert outcome["largest_relative_loss_difference"] < 1e-4


def test_thirty_kills_lose_nothing(tmp_path: Path) -> None:
    words = [sys.executable, str(HERE / "kills.py"), "--tiny"]
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert outcome["kills"] >= 30
    assert (outcome["rows_lost"], outcome["rows_duplicated"], outcome["problems"]) == (0, 0, 0)
    assert outcome["rows_redone_max"] <= outcome["rows_redone_bound"]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_rate_distortion_curves_run(tmp_path: Path) -> None:
    outcome, _ = bench("rate_distortion", tmp_path, "--tiny")
    families = {point["family"] for point in outcome["points"]}
    assert families == {"topk", "topp", "threshold", "multinomial", "systematic"}
    top = next(
        p
        for p in outcome["points"]
        if (p["family"], p["setting"], p["bits"]) == ("topk", "K=50", 10)
    )
    assert top["kl_bias"] < 0 < top["bytes"]  # a bucket's KL is a lower bound
    assert (tmp_path / "rate-distortion.svg").read_text().startswith("<svg")


def test_the_commit_bench_runs() -> None:
    done = subprocess.run(
        [sys.executable, str(HERE / "commit.py"), "--tiny"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (measured,) = json.loads(done.stdout.splitlines()[-1])["by_entries"].values()
    assert measured["tokens"] == 8 * 512
    steps = measured["milliseconds"]
    assert all(
        steps[name] > 0
        for name in ("check rows", "encode", "fsync", "sha256", "read back", "record")
    )


@pytest.mark.slow
def test_the_loader_bench_runs() -> None:
    outcome, _ = bench("loader", "--tiny")
    assert set(outcome["speed"]) == {"rows", "tokens", "repeats", "stillroom", "datasets"}
    found = outcome["features"]
    assert found["bytes_over_targets"] > 3
    assert found["companions"]["rows"] == found["targets"]["rows"] == [16]
    assert outcome["resume"]["footers_opened"] == outcome["resume"]["footers_needed"]
    assert outcome["trainer"]["loader_over_trainer"] > 0
    assert outcome["check"]["check_over_read"] > 0


@pytest.mark.assets
@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_the_comparison_of_engines_runs(tmp_path: Path, assets: Path) -> None:
    """In a process of its own: what vLLM leaves behind in one is not for other tests."""
    script = [sys.executable, str(HERE / "engines.py"), str(tmp_path), "--tiny"]
    environment = os.environ | {"STILLROOM_ASSETS": str(assets)}
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=True)
    outcome = json.loads(done.stdout.splitlines()[-1])
    for of in outcome["against_hf"].values():
        assert max(of["entries"], of["by at most"], of["tail beyond its bound"]) < outcome["bar"]
        assert of["entropy above"] < outcome["bar"]
    assert outcome["planted"]["shifted"] > outcome["bar"]
    stale = outcome["planted"]["stale prefix"]
    assert isinstance(stale, str) or stale > outcome["bar"]
    assert outcome["against_hf"]["kept"]["texts read again"] == 0
    assert outcome["students"]["largest difference of engines"] < 1e-3


@pytest.mark.slow
def test_the_workers_bench_runs() -> None:
    outcome, _ = bench("workers", "--tiny")
    (measured,) = outcome["rounds"]
    assert sum(measured["one"]["shares"]) == sum(measured["shared"]["shares"]) == 96
    assert sum(measured["apart"]["shares"]) == 2 * 96
    assert measured["one"]["rows_redone"] == measured["apart"]["rows_redone"] == 0


@pytest.mark.slow
def test_the_bench_of_lost_nodes_runs() -> None:
    """In a process of its own: it decides what Ray reads of the environment."""
    pytest.importorskip("ray", reason="Ray is not installed (pip install 'stillroom[ray]')")
    words = [sys.executable, str(HERE / "ray_nodes.py"), "--tiny", "--only", "stillroom"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout.splitlines()[-1])["found"]
    assert found["in_the_end"] == {"rows": 600, "different": 600}
    assert found["made_again"] <= 4 * 256, "two workers died, each with two commits at most"


@pytest.mark.parametrize("more", [[], ["--claims-only"]])
def test_the_scale_bench_runs(more: list[str]) -> None:
    alone, eight = bench("scale", "--tiny", *more)[0]["rows"]
    assert (alone["workers"], alone["claims_refused_percent"], alone["made_twice_percent"]) == (
        1,
        0,
        0,
    )
    assert eight["claims_refused_percent"] < 2
    assert ("commits_per_second" in eight) == (not more)


@pytest.mark.slow
def test_the_plan_bench_runs(tmp_path: Path) -> None:
    stages = bench("plan", tmp_path, "--tiny")[0]["stages"]
    assert stages["generate"] == {"planned": 3000, "committed": 1800, "pending": 1200}


@pytest.mark.slow
def test_the_experiment_on_targets_runs_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    outcome, _ = bench("targets", tmp_path, "--tiny")
    arms, points, zipf = outcome["arms"], outcome["angles"], outcome["estimators"]["zipf"]
    assert zipf["dropped tail, id 2"] == pytest.approx(0.1390, abs=5e-5)
    assert zipf["to label, id 1"] == pytest.approx(0.1408, abs=5e-5)
    assert zipf["distinct_ids"] == pytest.approx({"4": 3.94, "13": 12.29, "50": 43.03}, abs=5e-3)
    assert zipf["largest error of the mean, standard errors"] < 3
    for draw, ids in outcome["estimators"][
        "distinct_ids"
    ].items():  # the closed form, against what is drawn
        assert outcome["estimators"]["measured"][f"{draw} 13"]["distinct_ids"] == pytest.approx(
            ids["13"], rel=0.05
        )
    assert (arms["ce"]["share"][0], arms["full"]["share"][0]) == pytest.approx((0, 100))
    assert arms["top3-bucket"]["kept_mass"] < 1
    assert (arms["top3-bucket"]["entries"], arms["ce"]["entries"]) == (3.0, None)
    assert list(points) == ["start", "middle", "end"]
    assert all(
        0 < angle < 180
        for of in points.values()
        for angles in of["angle"].values()
        for angle in angles
    )
    assert (tmp_path / "arms.svg").read_text().startswith("<svg")
    assert (tmp_path / "angles.svg").read_text().startswith("<svg")
    again, _ = bench("targets", tmp_path, "--tiny", "--report")
    assert again["arms"] == arms


@pytest.mark.assets
@pytest.mark.slow
def test_the_comparison_of_losses_on_sst2_runs(
    tmp_path: Path, assets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STILLROOM_ASSETS", str(assets))
    outcome, _ = bench("sst2", tmp_path, "--tiny", "--seeds", "0")
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


@pytest.mark.assets
@pytest.mark.slow
def test_the_comparison_of_ways_to_distil_runs_and_goes_on_where_it_stopped(
    tmp_path: Path, assets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STILLROOM_ASSETS", str(assets))
    words = (tmp_path, "--tiny", "--seeds", "0", "--arms")
    outcome, _ = bench("ways", *words, "logits,hidden", "--only", "classify")
    stored = outcome["classify"]["stored"]["features"]["hidden 1"]
    assert stored["bytes_a_vector"] == 16 + 4, "int8 and a scale"
    logits, hidden = outcome["classify"]["arms"]
    assert (logits["bytes"], list(hidden["bytes"])) == ({}, ["token"])
    assert hidden["minus logits"] == [hidden["accuracy"][0] - logits["accuracy"][0]]
    before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("students/*/*.json")}
    assert len(before) == 2 * 2, "validation and test of each student"
    both, said = bench("ways", *words, "hidden")
    assert both["classify"] == outcome["classify"]
    assert {file: file.stat().st_mtime_ns for file in before} == before, "nothing is done again"
    assert "| hidden | logits, and the last block's states |" in said
    (alone,) = both["causal"]["arms"]
    assert (alone["arm"], list(alone["bytes"])) == ("hidden", ["token"])
    assert len(alone["cross_entropy"]) == 1


@pytest.mark.slow
def test_the_equivalence_bench_runs() -> None:
    outcome, _ = bench("equivalence", "--tiny", "--learning-rate", "5e-3")
    exact, ten, shifted = (
        runs[0]["loss_worst"] for runs in (*outcome["by_bits"].values(), outcome["shifted"])
    )
    assert exact < 1e-5 < ten < 1e-2 < shifted


@pytest.mark.slow
def test_the_gpu_check_rehearses(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    words = [
        sys.executable,
        str(HERE / "gpu_check.py"),
        "--rehearse",
        "--only",
        "kernels",
        "traffic",
    ]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    out = Path(done.stdout.splitlines()[-1].removeprefix("report: "))
    assert out.parent == tmp_path, "not where results are kept"
    page, figures, log = (
        next(out.glob(f"gpu-*-rehearsal.{suffix}")).read_text() for suffix in ("md", "json", "log")
    )
    outcome = json.loads(figures)
    assert [part["status"] for part in outcome["parts"].values()] == ["ok", "ok"]
    assert {"look", "spread, T = 2", "block_sums, m = 2"} < set(
        outcome["parts"]["traffic"]["kernels"]
    )
    assert "spread, softcap" in page
    assert "4 passed" in log


def test_the_gpu_check_goes_on_after_parts_that_fail_or_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("gpu_check", HERE / "gpu_check.py")
    assert spec is not None
    assert spec.loader is not None
    gpu_check = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpu_check)
    monkeypatch.setattr(gpu_check, "HERE", tmp_path)
    (tmp_path / "loss.py").write_text("import signal; signal.pause()")
    (tmp_path / "score.py").write_text("import sys; print('half'); sys.exit('broken')")
    bar = {"what": "a ratio", "found": 1.0, "bar": "<= 1.10", "met": True}
    (tmp_path / "loader.py").write_text(
        f"import json; print('a table'); print(json.dumps({{'bars': [{bar}]}}))"
    )
    other = {"bars": {"another": {"found": 0.9, "at_least": 0.95}}}
    (tmp_path / "traffic.py").write_text(f"import json; print(json.dumps({other}))")
    report = gpu_check.Report(
        tmp_path,
        dict.fromkeys(("gpu", "commit", "driver", "python", "torch"))
        | {"gpu": "NVIDIA H200", "date": "2026-11-21", "triton": None, "transformers": None},
    )
    for name, limit in (
        ("loss", 1.5),
        ("score", 60),
        ("loader", 60),
        ("traffic", 60),
        ("pipeline", 60),
        ("train_step", 0.2),
    ):
        report.add(gpu_check.run(name, limit, dict(os.environ), rehearse=False))
    outcome = json.loads((tmp_path / "gpu-2026-11-21-nvidia-h200.json").read_text())["parts"]
    assert {name: part["status"] for name, part in outcome.items()} == {
        "loss": "overran",
        "score": "failed",
        "loader": "ok",
        "traffic": "ok",
        "pipeline": "failed",
        "train_step": "no time left",
    }
    page = (tmp_path / "gpu-2026-11-21-nvidia-h200.md").read_text()
    assert "| traffic: another | 0.9 | >= 0.95 | **no** |" in page
    assert "| loader: a ratio | 1 | <= 1.10 | yes |" in page
    assert "half\nbroken" in page
    assert "a table" in page


@pytest.mark.slow
def test_the_pipeline_bench_accounts_for_every_second(tmp_path: Path) -> None:
    outcome, _ = bench("pipeline", "--tiny", "--out", tmp_path)
    assert list(outcome["stages"]) == ["runner", "data", "generate", "score", "train", "evaluate"]
    parts = [seconds for row in outcome["stages"].values() for seconds in row.values()]
    assert min(parts) >= 0
    assert sum(parts) == pytest.approx(outcome["seconds"], rel=0.05)
    worked = {name: row["model"] > 0 for name, row in outcome["stages"].items()}
    assert worked == {"runner": False, "data": False} | dict.fromkeys(
        ("generate", "score", "train", "evaluate"), True
    )
    assert [line["what"].split(":")[0] for line in outcome["bars"]] == [
        "data",
        "generate",
        "score",
        "train",
        "evaluate",
    ]
    assert (tmp_path / "pipeline.md").read_text().count("\n") > len(outcome["stages"])


@pytest.mark.slow
def test_the_bench_of_the_training_step_runs(tmp_path: Path) -> None:
    outcome, _ = bench("train_step", "--tiny", "--out", tmp_path)
    arms = outcome["arms"]
    assert set(arms) >= {"KL + CE", "CE", "padded rows", "checkpointing", "plain CE"}
    assert arms["KL + CE"]["padding_share"] == 0 <= arms["padded rows"]["padding_share"]
    assert all(0 < arm["mfu"] < 1 and arm["tokens_per_second"] > 0 for arm in arms.values())
    assert outcome["kl_over_ce"] > 0
    assert json.loads((tmp_path / "train_step.json").read_text()) == outcome


def test_the_loss_bench_runs(tmp_path: Path) -> None:
    outcome, said = bench("loss", "--tiny", "--out", tmp_path)
    assert {
        "three products",
        "ours",
        "ours, hard alone",
        "plain torch CE",
        "plain torch",
    } <= outcome["time"].keys()
    assert all(row["seconds"] > 0 for row in outcome["time"].values())
    found = {bar["what"]: bar["found"] for bar in outcome["bars"]}
    assert found["float32 error"] < 1e-5
    assert found["bfloat16 error beyond the usual loss's"] < 1e-2
    assert {bar["met"] for bar in outcome["bars"]} == {None}, "tiny figures are not judged"
    assert "not met" not in said
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".json", ".md"]


@pytest.mark.slow
def test_the_scoring_bench_runs(tmp_path: Path) -> None:
    outcome, _ = bench("score", "--tiny", "--cpu", "--out", tmp_path)
    assert list(outcome["over_bare"]) == ["bare", "reduced", "stage", "plain torch"]
    clock = outcome["stage_clock"]
    assert sum(clock[name] for name in ("model", "tokenizer", "disk", "other")) == pytest.approx(
        1, abs=1e-3
    )
    assert clock["model"] > 0 < clock["disk"]
    assert max(outcome["errors"]["ours"].values()) < 1e-5
    assert json.loads((tmp_path / "score.json").read_text()) == outcome


def test_the_bench_of_the_house_counts_what_is_there(tmp_path: Path) -> None:
    sources = {
        "storage/__init__.py": '"""One line."""\n',
        "storage/a.py": "from .b import second\n\n# why\nfirst = second\n",
        "storage/b.py": "from .rooms import c\nfrom .a import first\nsecond: int = c.one()\n",
        "storage/rooms/__init__.py": "",
        "storage/rooms/c.py": "def one():\n    return 1\n",
    }
    for name, source in sources.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    words = [sys.executable, str(HERE / "house.py"), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])[str(tmp_path)]
    assert found["entries"] == {"storage": 3, "stages": 0, "pipeline": 0}
    assert found["arrows of files"]["storage"] == found["arrows of rooms"]["storage"] == 3
    assert (found["circles of files"], found["files"], found["lines of code"]) == (1, 5, 7)
    assert (found["statements"], found["top-level names"]) == (8, 3)
    assert found["comment lines, %"] == pytest.approx(100 / 9, abs=0.01)


def test_the_bench_of_sizes_runs() -> None:
    outcome, _ = bench("sizes", "--tiny")
    found = outcome["sizes"]
    refused = {"a recipe with a name of 1 MB", "a recipe of 1 MB of fields"}
    assert {name for name, row in found.items() if row["codes"] == [2]} == refused
    assert {row["codes"][-1] for name, row in found.items() if name not in refused} == {0}
    assert all(row["right"] for row in found.values())


@pytest.mark.slow
def test_the_comparison_of_token_types_runs(tmp_path: Path) -> None:
    outcome, _ = bench("token_types", tmp_path, "--tiny", "--seeds", "0")
    assert set(outcome["results"]) == {"teacher", "labels alone", "distilled"}
    for numbers in outcome["results"].values():
        assert 0 <= numbers["entity_f1"][0] <= 1
    assert outcome["results"]["teacher"]["kl_teacher"][0] == 0


@pytest.mark.assets
@pytest.mark.slow
def test_the_comparison_of_masked_models_runs(
    tmp_path: Path, assets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STILLROOM_ASSETS", str(assets))
    outcome, _ = bench("masked_lm", tmp_path, "--tiny", "--seeds", "0")
    assert set(outcome["results"]) == {"teacher", "labels alone", "distilled"}
    assert outcome["results"]["teacher"]["kl_teacher"][0] == 0


@pytest.mark.slow
@pytest.mark.assets
def test_the_comparison_of_digits_runs(tmp_path: Path) -> None:
    outcome, _ = bench("digits", tmp_path, "--tiny", "--seeds", "0")
    assert set(outcome["results"]) == {"teacher", "labels alone", "distilled"}
    for numbers in outcome["results"].values():
        assert 0 <= numbers["accuracy"][0] <= 1
    assert outcome["results"]["teacher"]["kl_teacher"][0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ranks", "sharded_memory"])
def test_the_benches_of_ranks_run(name: str) -> None:
    script = [sys.executable, str(HERE / f"{name}.py"), "--tiny"]
    steps = ["--steps", "2"]
    said = subprocess.run([*script, *steps], capture_output=True, text=True, check=True).stdout
    outcome = json.loads(said.splitlines()[-1])
    assert len(outcome["ranks"]) == 2 if name == "sharded_memory" else outcome["rows"][0]["same"]
