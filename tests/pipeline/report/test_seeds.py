"""Intervals over seeds: the quantiles of Student's t, and which runs are one."""

import math
from typing import Any

import numpy as np
import pytest

from stillroom.pipeline.report.seeds import grouped, interval, t_quantile

# Two-sided, from printed tables (Abramowitz and Stegun 1964, table 26.10).
TABLE = {
    (1, 0.95): 12.706,
    (2, 0.95): 4.303,
    (3, 0.95): 3.182,
    (4, 0.95): 2.776,
    (7, 0.95): 2.365,
    (10, 0.95): 2.228,
    (29, 0.95): 2.045,
    (30, 0.95): 2.042,
    (120, 0.95): 1.980,
    (1, 0.99): 63.657,
    (5, 0.99): 4.032,
    (60, 0.99): 2.660,
    (2, 0.90): 2.920,
    (9, 0.90): 1.833,
}


@pytest.mark.parametrize("known", TABLE)
def test_quantiles_are_those_of_the_printed_tables(known: tuple[int, float]) -> None:
    assert t_quantile(*known) == pytest.approx(TABLE[known], abs=5.01e-4)


def test_quantiles_have_closed_forms_at_one_and_two_degrees_and_the_normal_s_at_many() -> None:
    for confidence in (0.5, 0.9, 0.95, 0.999):
        assert t_quantile(1, confidence) == pytest.approx(
            math.tan(math.pi * confidence / 2), rel=1e-9
        )
        two = confidence * math.sqrt(2 / (1 - confidence**2))
        assert t_quantile(2, confidence) == pytest.approx(two, rel=1e-9)
    assert t_quantile(5_000) == pytest.approx(1.959964, abs=6e-4)


def test_an_interval_is_the_mean_and_t_standard_errors_and_holds_the_truth_19_times_in_20() -> None:
    mean, half = interval([0.30, 0.32, 0.37])
    assert mean == pytest.approx(0.33)
    assert half == pytest.approx(
        4.302653 * np.std([0.30, 0.32, 0.37], ddof=1) / math.sqrt(3), rel=1e-6
    )
    assert interval([0.5]) == (0.5, None)
    draws = np.random.default_rng(0).normal(3.0, 2.0, size=(2000, 3))
    covered = [abs(mean - 3.0) <= half for mean, half in map(interval, draws.tolist())]
    assert np.mean(covered) == pytest.approx(
        0.95, abs=0.015
    )  # three standard errors of a share of 2,000


def report(
    seed: int, kl: float, *, k: int = 64, baseline: float | None = 0.5, teacher: str = "t"
) -> dict[str, Any]:
    results: dict[str, Any] = {
        "student": {"kl_teacher": kl, "kl_teacher_se": 0.1, "top1_agreement": None, "rows": 9}
    }
    if baseline is not None:
        results["baseline"] = {"kl_teacher": baseline, "kl_teacher_se": 0.1}
    recipe = {"run": {"dir": f"runs/{seed}-{k}", "seed": seed}, "score": {"k": k}, "loss": {}}
    return {
        "settings": {"recipe": recipe, "teacher_id": teacher},
        "evaluation": {"results": results},
    }


def test_runs_are_one_if_seed_and_folder_alone_differ() -> None:
    reports = {
        "a0": report(0, 0.1),
        "b0": report(0, 0.2, k=8),
        "a1": report(1, 0.2),
        "other teacher": report(2, 0.2, teacher="u"),
        "a2": report(2, 0.6),
    }
    groups = [list(group.reports) for group in grouped(reports)]
    assert groups == [["a0", "a1", "a2"], ["b0"], ["other teacher"]]


def test_a_seed_counts_once() -> None:
    groups = grouped(
        {
            "first": report(0, 0.1),
            "again": report(0, 0.1),
            "second": report(1, 0.2),
            "third": report(1, 0.2),
        }
    )
    assert [group.seeds for group in groups] == [[0, 1], [0], [1]]


def test_the_difference_is_taken_seed_by_seed() -> None:
    pairs = [(0.30, 0.35), (0.50, 0.56), (0.10, 0.14)]
    (group,) = grouped(
        {str(i): report(i, kl, baseline=other) for i, (kl, other) in enumerate(pairs)}
    )
    mean, half = group.difference()["kl_teacher"]
    assert (mean, half) == pytest.approx(interval([-0.05, -0.06, -0.04]))
    assert half < 0.03 < group.results()["student"]["kl_teacher"][1]  # what the seeds share cancels
    assert set(group.results()["student"]) == {
        "kl_teacher"
    }  # no errors over prompts, nothing null, no counts
    summary = group.summary()
    assert summary["seeds"] == [0, 1, 2]
    assert summary["student_minus_baseline"]["kl_teacher"] == {"mean": mean, "half_width": half}


def test_without_a_baseline_there_is_no_difference() -> None:
    (group,) = grouped({str(i): report(i, 0.1 * i, baseline=None) for i in range(3)})
    assert group.difference() == {}
    assert list(group.results()) == ["student"]
