"""The report: every number in it is the number in the JSON, whichever way the run went."""

import io
import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import reports
from kit import last_json, stillroom
from reports import RECIPE, black_box, difference, finished, train
from rich.console import Console

from stillroom.pipeline.printing.numbers import nats, significant, size
from stillroom.pipeline.printing.text import fenced, table
from stillroom.pipeline.report import compare as report_compare
from stillroom.pipeline.report import markdown as report_markdown
from stillroom.pipeline.report.report import load_report, outcome, page, results_table, write_report
from stillroom.pipeline.report.results import results as results_section
from stillroom.pipeline.report.sections import curve as curve_section
from stillroom.pipeline.report.sections import thinned
from stillroom.storage.errors import IntegrityError, UsageError


def render(report: dict[str, Any]) -> str:
    return report_markdown.page(page(report))


def compare(runs: list[Path]) -> str:
    return report_markdown.page(report_compare.page({str(run): load_report(run) for run in runs}))


def results(evaluation: dict[str, Any], recipe: dict[str, Any]) -> str:
    return report_markdown.block(results_section(evaluation, recipe))


def curve(name: str, trained: dict[str, Any]) -> str:
    section = curve_section(name, trained)
    assert section is not None
    return report_markdown.block(section)


@pytest.fixture
def evaluation() -> dict[str, Any]:
    return reports.evaluation()


@pytest.fixture
def facts() -> dict[str, Any]:
    return reports.facts()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two arms with its report; to be read only."""
    return finished(
        tmp_path_factory.mktemp("finished") / "run", reports.evaluation(), reports.facts()
    )


def cells(markdown: str, heading: str) -> list[list[str]]:
    """The first table below a heading, header and rule left out."""
    lines = markdown.split(f"## {heading}\n")[1].splitlines()
    rows = [line for line in lines if line.startswith("|")]
    end = next(
        (i for i, line in enumerate(lines) if rows and line == "" and lines.index(rows[0]) < i),
        len(lines),
    )
    rows = [line for line in lines[:end] if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row.strip("|"))] for row in rows[2:]]


def first_number(cell: str) -> float:
    return float(re.sub("[,%]", "", cell.strip().split("±")[0]))


def test_every_number_of_the_results_table_is_the_one_in_the_json(run: Path) -> None:
    results = json.loads((run / "report.json").read_text())["evaluation"]["results"]
    rows = cells((run / "report.md").read_text(), "Results")
    assert [row[0].split()[0] for row in rows] == ["teacher", "student", "baseline", "student"]
    for row, name in zip(rows, ("teacher", "student_before", "baseline", "student"), strict=True):
        expected = results[name]
        assert first_number(row[1]) == round(expected["cross_entropy"], 4)
        assert float(row[1].split("±")[1]) == expected["cross_entropy_se"]
        assert first_number(row[2]) == pytest.approx(expected["perplexity"], rel=1e-3)
        assert first_number(row[3]) == round(expected["kl_teacher"], 4)
        assert first_number(row[4]) == round(100 * expected["acceptance"], 1)
        assert first_number(row[5]) == round(100 * expected["top1_agreement"], 1)
        assert first_number(row[6]) == round(100 * expected["ece"], 2)
        assert first_number(row[6].split("±")[1]) == round(100 * expected["ece_se"], 2)


def test_the_curve_has_ten_points_with_the_numbers_of_the_history(run: Path) -> None:
    markdown = (run / "report.md").read_text()
    history = {p["tokens"]: p for p in train(5.0)["history"]}
    rows = cells(markdown, "Training: student (distilled)")
    assert len(rows) == 10
    assert (first_number(rows[0][0]), first_number(rows[-1][0])) == (8192, 819_200)
    for row in rows:
        point = history[int(first_number(row[0]))]
        assert [first_number(c) for c in row[1:4]] == [
            round(point[n], 4) for n in ("loss", "soft", "hard")
        ]
        assert float(row[4]) == pytest.approx(point["learning_rate"], rel=1e-2)
    assert "## Training: baseline" in markdown


def test_stages_show_rows_bytes_time_and_why_rows_were_rejected(run: Path) -> None:
    generate, trained = cells((run / "report.md").read_text(), "Time and bytes")
    assert generate == [
        "generate",
        "398",
        "51,234",
        "2 (too_long)",
        "120.6 KiB",
        "2.4",
        "1m 02s",
        "833",
    ]
    assert trained == ["train", "-", "819,200", "-", "-", "-", "5m 22s", "-"]


def test_the_report_says_where_it_comes_from(run: Path) -> None:
    markdown = (run / "report.md").read_text()
    assert markdown.startswith("# big-stories distilled into a fresh student\n")
    for fact in (
        "ab" * 16,
        "7" * 32,
        "5" * 32,
        "torch 2.13.0",
        "Linux x86_64",
        "/stores/stories",
        "topk, 64 entries",
    ):
        assert fact in markdown
    assert json.loads((run / "report.json").read_text())["settings"]["recipe"] == RECIPE


def test_the_loss_is_named_with_its_own_settings_and_schedules(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    recipe = report["settings"]["recipe"]

    def line(name: str = "loss", **loss: Any) -> str:
        recipe["loss"] = RECIPE["loss"] | loss
        return dict(cells(render(report), "What was run"))[name]

    assert line() == "1.0 x forward_kl (temperature 1.0, tail bucket) + 0.1 x cross-entropy"
    assert line("divergence") == (
        r"`KL(t \|\| p) = sum_i t_i (log t_i - log p_i)`, t the teacher, p the student "
        "(Hinton et al. 2015, arXiv 1503.02531)"
    )
    assert "skew_reverse_kl (temperature 1.0, tail bucket, skew 0.2)" in line(
        divergence="skew_reverse_kl", skew=0.2
    )
    wsd = {
        "shape": "wsd",
        "start": 0.1,
        "peak": 0.9,
        "end": 0.2,
        "warmup_fraction": 0.1,
        "decay_fraction": 0.1,
    }
    assert line(soft_weight=wsd, temperature=2.0).startswith(
        "(wsd: 0.1 to 0.9 in 0.1 of the tokens, to 0.2 in the last 0.1) x forward_kl "
        "(temperature 2.0"
    )
    recipe["score"] = {"targets": "full", "k": 64}
    assert line(hard_weight={"shape": "linear", "start": 1.0, "end": 0.0, "peak": None}) == (
        "1.0 x forward_kl (temperature 1.0) + (linear: 1.0 to 0.0) x cross-entropy"
    )


def test_samples_stand_side_by_side_and_cannot_break_the_page(run: Path) -> None:
    markdown = (run / "report.md").read_text()
    assert "````\na time | there\nwas ```code```\n````" in markdown
    assert markdown.count("there\nwas") == 1  # the reference is the teacher's own text, shown once
    assert markdown.count("````") == 2


def test_tokens_of_the_text_cannot_mean_anything_in_markdown(evaluation: dict[str, Any]) -> None:
    report = {
        "title": "t",
        "outcome": "o",
        "evaluation": evaluation | {"views": reports.views()},
        "train_dir": "d",
    }
    text = render(
        report | {"train": {"student": train(5.0)}, "settings": {"recipe": RECIPE}, "facts": {}}
    )
    rows = cells(text, "Row 00000000")
    assert len(rows) == 8
    assert [row[:3] for row in rows[:2]] == [
        ["34", "`\u2205`", "1.071"],
        ["33", "`\u2423cat`", "1.036"],
    ]
    assert "</script>" not in re.sub(
        r"`[^`]*`", "", text.split("Farthest off at:")[1].split("### ")[0]
    )


def test_a_report_written_again_replaces_the_old_one(tmp_path: Path, facts: dict[str, Any]) -> None:
    run = finished(tmp_path / "run", reports.evaluation(), facts)
    more = {"store": "/elsewhere", "notes": ["3 turns of the assistant are not scored"]}
    write_report(run, run / "train-student", facts | more)
    text = (run / "report.md").read_text()
    assert "/elsewhere" in text
    assert "| note | `3 turns of the assistant are not scored` |" in text
    assert sorted(p.name for p in run.iterdir() if p.is_file()) == [
        "report.html",
        "report.json",
        "report.md",
    ]


def test_the_outcome_is_told_whichever_way_it_went(evaluation: dict[str, Any]) -> None:
    assert outcome(evaluation) == (
        "The distilled student is 0.041 nats closer to the teacher than cross-entropy alone (KL "
        "0.312 against 0.353)."
    )
    evaluation["differences"]["baseline"] = difference(0.041)
    assert "0.041 nats farther from the teacher than cross-entropy alone" in outcome(evaluation)
    evaluation["differences"]["baseline"] = difference(-0.001, error=0.003)
    assert "does not clearly differ from cross-entropy alone" in outcome(evaluation)
    evaluation["measured_on"]["kl_is_lower_bound"] = True
    assert "KL, a lower bound, 0.312" in outcome(evaluation)
    assert "KL to teacher, lower bound (nats/token)" in results(evaluation, {})
    del evaluation["differences"]["baseline"]
    assert "8.453 nats closer to the teacher than before training" in outcome(evaluation)


def test_a_black_box_run_has_no_kl_and_no_teacher_line(
    tmp_path: Path, evaluation: dict[str, Any]
) -> None:
    without = RECIPE | {"score": None}
    markdown = (
        finished(tmp_path / "run", black_box(evaluation), {}, without) / "report.md"
    ).read_text()
    assert "8.264 nats better at predicting the held-out text than before training" in markdown
    rows = cells(markdown, "Results")
    assert [row[0] for row in rows] == ["student before training", "student (distilled)"]
    assert "| arm | cross-entropy (nats/token) | perplexity | ECE |" in markdown
    assert "no KL" in markdown
    assert "KL(t" not in markdown


def test_answers_are_a_column_only_where_they_were_scored(
    evaluation: dict[str, Any], run: Path
) -> None:
    report = json.loads((run / "report.json").read_text())
    assert "answers" not in render(report).split("## What was run")[0]
    report["evaluation"]["results"]["student"]["answers"] = 0.4321
    settings = {
        "metric": "rouge_l",
        "pattern": None,
        "prompts": 50,
        "max_tokens": 128,
        "against": "the teacher's own text",
    }
    report["evaluation"]["answers"] = settings
    rows = cells(render(report), "Results")
    assert [row[-1] for row in rows] == ["-", "-", "-", "0.432"]
    assert (
        "rouge_l, 0 to 1, of greedy answers (at most 128 tokens) to 50 held-out prompts"
        in render(report)
    )


def test_the_terminal_table_has_the_same_numbers_in_80_columns(
    evaluation: dict[str, Any], run: Path
) -> None:
    evaluation["results"]["student"]["answers"] = 0.4321
    console = Console(width=80, file=io.StringIO())
    console.print(results_table(evaluation["results"]))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) == 80
    assert all(
        word in lines[0] + lines[1]
        for word in ("entropy", "perplexity", "KL", "accept", "top-1", "ECE")
    )
    drawn = lines[2:]
    rows = cells((run / "report.md").read_text(), "Results")
    assert [line.split()[0] for line in drawn] == [
        "teacher",
        "student_before",
        "baseline",
        "student",
    ]
    for line, row in zip(drawn, rows, strict=True):
        assert all(cell.split("±")[0].strip(" %") in line for cell in row[1:])
    assert drawn[-1].endswith("0.432")


def test_comparison_shows_what_differs_first_and_warns_of_other_held_out_rows(
    tmp_path: Path, evaluation: dict[str, Any], facts: dict[str, Any]
) -> None:
    first = finished(tmp_path / "one", evaluation, facts)
    other = deepcopy(evaluation)
    other["results"]["student"]["kl_teacher"] = 0.2999
    changed = RECIPE | {
        "run": RECIPE["run"] | {"dir": "elsewhere"},
        "score": {"targets": "topk", "k": 8},
        "generate": None,
    }
    second = finished(tmp_path / "two", other, facts, changed)
    page = compare([first, second])
    differing = {row[0]: row[1:] for row in cells(page, "What differs")}
    assert differing["`score.k`"] == ["64", "8"]
    assert differing["`generate.samples`"] == ["2", "-"]
    assert not {"`run.dir`", "`score.targets`", "`run.seed`"} & set(differing)
    results = cells(page, "Results")
    assert [first_number(row[4]) for row in results if row[1] == "student (distilled)"] == [
        0.3121,
        0.2999,
    ]
    assert "different held-out rows" not in page
    other["measured_on"]["snapshot"] = "6" * 32
    third = finished(tmp_path / "three", other, facts)
    assert "different held-out rows" in compare([first, third])
    assert "the recipes are the same" in compare([first, third])
    other["measured_on"]["table"] = (
        "generations"  # of whose rows a snapshot's id says nothing about the scored ones
    )
    fourth = compare([first, finished(tmp_path / "four", other, facts)])
    assert "different held-out rows" not in fourth
    assert "judged on text alone, others on scored text" in fourth


def seeded(
    folder: Path, evaluation: dict[str, Any], seeds: dict[int, float], **changed: Any
) -> list[Path]:
    """Finished runs of one recipe, by seed the student's KL."""
    made = []
    for seed, kl in seeds.items():
        found = deepcopy(evaluation)
        found["results"]["student"]["kl_teacher"] = kl
        recipe = (
            RECIPE | changed | {"run": RECIPE["run"] | {"dir": f"{folder}-{seed}", "seed": seed}}
        )
        made.append(finished(folder.with_name(f"{folder.name}-{seed}"), found, {}, recipe))
    return made


def test_runs_that_differ_in_their_seed_are_one_with_an_interval(
    tmp_path: Path, evaluation: dict[str, Any]
) -> None:
    runs = seeded(tmp_path / "a", evaluation, {0: 0.30, 1: 0.32, 2: 0.34})
    page = compare(runs)
    assert "## What differs\n\nNothing but the seed." in page
    rows = {row[1]: row[2:] for row in cells(page, "Results over seeds")}
    half = 4.302653 * 0.02 / 3**0.5
    assert rows["student (distilled)"][2] == f"0.3200 ± {half:.4f}"
    assert rows["teacher"][2] == "0.0000"
    assert rows["student - baseline, seed by seed"][2] == f"{0.32 - 0.3531:.4f} ± {half:.4f}"
    assert (
        rows["student - baseline, seed by seed"][0] == "-0.0420"
    )  # the same for every seed: no interval
    assert (
        f"`{runs[0]}` (3 seeds): KL to the teacher -0.033 ± 0.050 nats against cross-entropy "
        "alone, so it does" in page
    )
    assert all(f"seed {seed} in `{run}`" in page for seed, run in enumerate(runs))
    assert "\n## Results\n" not in page
    closer = compare(seeded(tmp_path / "b", evaluation, {0: 0.30, 1: 0.301, 2: 0.299}))
    assert "± 0.0025 nats against cross-entropy alone (seed 0" in closer


def test_the_command_line_says_it_for_people_and_for_machines(
    tmp_path: Path, evaluation: dict[str, Any]
) -> None:
    runs = seeded(tmp_path / "a", evaluation, {0: 0.30, 1: 0.32, 2: 0.34})
    done = stillroom("report", *runs, "--out", tmp_path / "side-by-side.html", "--json")
    assert done.stdout.startswith(compare(runs))
    assert done.stderr == f"page: {tmp_path / 'side-by-side.html'}\n"
    assert "3 seeds" in (tmp_path / "side-by-side.html").read_text()
    found = last_json(done)
    assert [run["evaluation"]["results"]["student"]["kl_teacher"] for run in found["runs"]] == [
        0.30,
        0.32,
        0.34,
    ]
    (group,) = found["over_seeds"]
    assert group["seeds"] == [0, 1, 2]
    assert group["results"]["student"]["kl_teacher"]["mean"] == pytest.approx(0.32)
    half = group["student_minus_baseline"]["kl_teacher"]["half_width"]
    assert half == pytest.approx(4.302653 * 0.02 / 3**0.5, rel=1e-6)


def test_other_runs_stand_beside_those_of_several_seeds(
    tmp_path: Path, evaluation: dict[str, Any]
) -> None:
    many = seeded(tmp_path / "a", evaluation, {0: 0.30, 1: 0.32})
    few = seeded(tmp_path / "b", evaluation, {0: 0.31}, score=RECIPE["score"] | {"k": 8})
    page = compare([few[0], *many])
    differing = {row[0]: row[1:] for row in cells(page, "What differs")}
    assert differing == {"`score.k`": ["8", "64"], "`run.seed`": ["0", "0, 1"]}
    assert {row[0] for row in cells(page, "Results over seeds")} == {f"`{many[0]}` (2 seeds)"}
    assert {row[0] for row in cells(page, "Results")} == {f"`{few[0]}`"}
    assert "different held-out rows" not in page
    evaluation["measured_on"]["snapshot"] = "6" * 32
    elsewhere = seeded(tmp_path / "c", evaluation, {5: 0.30})
    assert "different held-out rows" in compare(
        [*many, *elsewhere]
    )  # another seed of the same recipe


def test_the_gradient_of_the_recipe_s_targets_is_in_the_report(evaluation: dict[str, Any]) -> None:
    assert "Gradient" not in results(evaluation, {})
    before = {"angle_degrees": 12.345, "norm_ratio": 0.98765, "tokens": 16_390}
    evaluation["gradient"] = {"student_before": before, "student": None}
    line = "on 16,390 held-out tokens, with the recipe's targets against the whole distribution: "
    line += "student before training 12.35 degrees, 0.988 of its length."
    assert line in results(evaluation, {})
    undefined = {"angle_degrees": None, "norm_ratio": 0.0, "tokens": 16_390}
    evaluation["gradient"]["student"] = undefined
    assert "student (distilled) - degrees, 0.000 of its length" in results(evaluation, {})


def test_what_is_only_bounded_is_called_so_and_differences_are_in_points(
    evaluation: dict[str, Any],
) -> None:
    evaluation["differences"]["baseline"] |= {"acceptance": 0.0123, "acceptance_se": 0.0011}
    assert "acceptance 1.23 ± 0.11 points" in results(evaluation, {})
    assert "acceptance are exact" in results(evaluation, {})
    evaluation["measured_on"]["kl_is_lower_bound"] = True
    assert "acceptance, upper bound" in results(evaluation, {})
    assert "an upper bound of the acceptance" in results(evaluation, {})


def test_an_unfinished_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"report\.json: no such file.*stillroom run"):
        compare([tmp_path])
    with pytest.raises(UsageError, match=r"evaluation\.json: no such file"):
        write_report(tmp_path, tmp_path, {})
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(IntegrityError, match="not as a run writes it"):
        compare([tmp_path])


def test_text_that_is_no_plain_sample_is_pointed_out(evaluation: dict[str, Any]) -> None:
    assert "is not calibrated on it" not in results(evaluation, RECIPE)
    assert "temperature 0.0, top-p 1.0" in results(
        evaluation, {"generate": {"temperature": 0.0, "top_p": 1.0}}
    )
    assert "is not calibrated on it" not in results(evaluation, {"generate": None})


def test_validation_follows_the_curve() -> None:
    trained = train(5.0) | {
        "validation": [{"step": 1, "tokens": 8192, "loss": 4.321, "soft": None, "hard": 4.321}]
    }
    assert "### Validation: student (distilled)" in curve("student", trained)
    assert "| 8,192 | 4.3210 | - | 4.3210 |" in curve("student", trained)
    assert "Validation" not in curve("student", train(5.0))


def test_a_short_history_is_kept_whole() -> None:
    points = [{"tokens": i} for i in range(7)]
    assert thinned(points) == points
    assert thinned([]) == []


def test_numbers_are_printed_in_the_unit_that_fits() -> None:
    assert [nats(v) for v in (0.3121, 0.0, 0.00123, -0.5)] == ["0.312", "0.000", "0.0012", "-0.500"]
    assert [significant(v) for v in (1.23456, 5.23, 999.96, 19999.9, None)] == [
        "1.235",
        "5.230",
        "1,000",
        "20,000",
        "-",
    ]
    assert [size(v) for v in (12, 2048, 3 * 2**40)] == ["12 B", "2.0 KiB", "3.0 TiB"]
    assert table(["a|b"], [["x\ny"]]) == "| a\\|b |\n| --- |\n| x y |"
    assert fenced("a ``` b").startswith("````\n")


def test_what_is_scheduled_has_a_column_beside_the_losses() -> None:
    point = {
        "tokens": 512,
        "loss": 2.0,
        "soft": 1.5,
        "hard": 3.0,
        "learning_rate": 1e-3,
        "temperature": 4.0,
    }
    shown = curve("student", {"history": [point, point | {"tokens": 1024, "temperature": 1.0}]})
    assert "| learning rate | temperature |" in shown
    assert "| 1.00e-03 | 4.000 |" in shown
    assert "times the temperature squared" in shown
