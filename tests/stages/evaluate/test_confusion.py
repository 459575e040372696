"""Precision, recall, F1 and confusion against scikit-learn and plain loops.

Their errors are tested against resampling.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillroom.stages.evaluate.by_class.confusion import AVERAGES, SHARES, Confusion

FIXTURES = Path(__file__).parents[2] / "fixtures"
OTHERS = json.loads((FIXTURES / "metrics" / "others.json").read_text())
"""What scikit-learn says of random answers; `made_by.py` beside it asks."""
LABELS = [2, 2, 2, 0, 0, 3, 1, 0, 3, 3, 0, 2, 0, 1, 2, 1, 1, 0, 2, 1]
LABELS += [0, 2, 3, 1, 2, 3, 0, 1, 3, 0, 0, 1, 2, 1, 1, 0, 2, 0, 0, 3]
ANSWERS = [2, 2, 2, 0, 0, 1, 1, 4, 3, 4, 1, 2, 0, 1, 2, 4, 1, 0, 2, 1]
ANSWERS += [0, 2, 4, 1, 0, 1, 0, 1, 1, 0, 0, 1, 2, 1, 1, 0, 2, 2, 0, 3]
# scikit-learn 1.9.1: classification_report(LABELS, ANSWERS, output_dict=True) and confusion_matrix.
# Class 4 is an answer and no label.
REPORT = {
    "precision": [0.9090909090909091, 0.6923076923076923, 0.9, 1.0, 0.0],
    "recall": [0.7692307692307693, 0.9, 0.9, 0.2857142857142857, 0.0],
    "f1": [0.8333333333333334, 0.782608695652174, 0.9, 0.4444444444444444, 0.0],
    "support": [13, 10, 10, 7, 0],
}
MEANS = {
    "macro": (0.7002797202797202, 0.570989010989011, 0.5920772946859904),
    "weighted": (0.8685314685314685, 0.75, 0.7692632850241546),
    "micro": (0.75, 0.75, 0.75),  # the report's `accuracy`
}
MATRIX = [[10, 1, 1, 0, 1], [0, 9, 0, 0, 1], [1, 0, 9, 0, 0], [0, 3, 0, 2, 2], [0, 0, 0, 0, 0]]


def confusion_of(labels: list[int], answers: list[int], texts_a_unit: int = 1) -> Confusion:
    found = Confusion()
    for number, pair in enumerate(zip(labels, answers, strict=True)):
        found.add((number // texts_a_unit).to_bytes(4, "big"), *pair)
    return found


def matrix_of(found: Confusion, classes: int) -> np.ndarray:
    matrix = np.zeros((classes, classes), int)
    for label, answer, texts in found.cells():
        matrix[label, answer] = texts
    return matrix


def randomly(seed: int) -> tuple[list[int], list[int], int]:
    """Up to 60 texts of up to 8 classes, some of which may be missing on either side."""
    rng = np.random.default_rng(seed)
    classes, texts = int(rng.integers(2, 9)), int(rng.integers(1, 60))
    labels = rng.integers(0, classes, texts)
    answers = np.where(rng.random(texts) < 0.5, labels, rng.integers(0, classes, texts))
    return labels.tolist(), answers.tolist(), classes


def test_every_number_is_scikit_learns() -> None:
    found = confusion_of(LABELS, ANSWERS)
    assert matrix_of(found, 5).tolist() == MATRIX
    by_class = found.by_class(6)  # of the sixth class there is nothing at all
    for name, values in REPORT.items():
        assert by_class[name] == pytest.approx([*values, 0])
    results = found.results()
    for average, means in MEANS.items():
        assert [results[f"{name}_{average}"] for name in SHARES] == pytest.approx(means)


@pytest.mark.parametrize("seed", range(20))
def test_random_confusion_is_what_plain_loops_count(seed: int) -> None:
    labels, answers, classes = randomly(seed)
    pairs = list(zip(labels, answers, strict=True))
    right = [sum(label == answer == c for label, answer in pairs) for c in range(classes)]
    own = [sum(label == c for label, _ in pairs) for c in range(classes)]
    given = [sum(answer == c for _, answer in pairs) for c in range(classes)]
    expected: dict[str, list[float]] = {"precision": [], "recall": [], "f1": []}
    for c in range(classes):
        p = right[c] / given[c] if given[c] else 0.0
        r = right[c] / own[c] if own[c] else 0.0
        expected["precision"].append(p)
        expected["recall"].append(r)
        expected["f1"].append(2 * p * r / (p + r) if p + r else 0.0)
    found = confusion_of(labels, answers)
    by_class, results = found.by_class(classes), found.results()
    occur = [c for c in range(classes) if own[c] or given[c]]
    for name, shares in expected.items():
        assert by_class[name] == pytest.approx(shares)
        assert results[f"{name}_macro"] == pytest.approx(sum(shares) / len(occur))
        weighted = sum(share * n for share, n in zip(shares, own, strict=True)) / len(labels)
        assert results[f"{name}_weighted"] == pytest.approx(weighted)
        assert results[f"{name}_micro"] == pytest.approx(sum(right) / len(labels))


@pytest.mark.parametrize("case", OTHERS["classes"])
def test_random_confusion_is_scikit_learns(case: dict[str, Any]) -> None:
    found, classes = confusion_of(case["labels"], case["answers"]), len(case["matrix"])
    assert matrix_of(found, classes).tolist() == case["matrix"]
    results, by_class = found.results(), found.by_class(classes)
    for average in AVERAGES:
        means = [results[f"{name}_{average}"] for name in SHARES]
        assert means == pytest.approx(case["means"][average])
    assert results["f1_micro"] == pytest.approx(case["accuracy"])
    for name, values in zip((*SHARES, "support"), case["by_class"], strict=True):
        assert by_class[name] == pytest.approx(values)


def test_standard_errors_are_the_spread_over_draws_of_prompts() -> None:
    """Prompts of two texts each, drawn again with replacement; 300 draws know a spread to 4 %."""
    rng = np.random.default_rng(5)
    labels = np.repeat(rng.choice(4, 150, p=[0.4, 0.3, 0.2, 0.1]), 2)
    answers = np.where(rng.random(300) < 0.7, labels, rng.integers(0, 4, 300))
    found = confusion_of(labels.tolist(), answers.tolist(), texts_a_unit=2)
    results, by_class = found.results(), found.by_class(4)
    drawn = []
    for _ in range(300):
        texts = (2 * rng.integers(0, 150, 150)[:, None] + [0, 1]).ravel()
        one = confusion_of(labels[texts].tolist(), answers[texts].tolist())
        shares = [value for name in SHARES for value in one.by_class(4)[name]]
        again = one.results()
        drawn.append([again[f"{s}_{a}"] for s in SHARES for a in AVERAGES] + shares)
    expected = [results[f"{s}_{a}_se"] for s in SHARES for a in AVERAGES]
    expected += [value for name in SHARES for value in by_class[f"{name}_se"]]
    # Linear in the texts, so a tenth off where a class has 30 of them.
    np.testing.assert_allclose(np.std(drawn, axis=0), expected, rtol=0.2)


def test_differences_are_paired_and_of_one_prompt_there_is_no_error() -> None:
    one, other = confusion_of(LABELS, ANSWERS), confusion_of(LABELS, LABELS)
    found = other.minus(one)
    assert found["f1_macro"] == pytest.approx(1 - MEANS["macro"][2])
    # Where only one of the two errs, its spread is that of the difference.
    assert found["recall_weighted_se"] == pytest.approx(one.results()["recall_weighted_se"])
    assert set(one.minus(one).values()) == {0.0}
    assert confusion_of(LABELS, ANSWERS, texts_a_unit=100).results()["f1_macro_se"] is None
    assert one.by_class(6)["f1_se"][5] is one.by_class(6)["recall_se"][4] is None
