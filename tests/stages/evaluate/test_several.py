"""What several teachers say of words of which some have no label."""

from functools import partial

import numpy as np
import pytest
import torch

from stillroom.stages.evaluate.by_class.entities import Entities
from stillroom.stages.evaluate.metrics import Tally, measure_teacher
from stillroom.stages.evaluate.teachers import Said
from stillroom.storage.tables.soft_targets import SoftTargets

GOLD = np.array([1, -1, 2])
SHARES = np.array([[0.25, 0.5, 1.0], [0.75, 0.5, 0.0]])


def full(probabilities: list[list[float]]) -> SoftTargets:
    stated = np.array(probabilities, np.float32)
    logprobs = np.log(stated)
    return SoftTargets(
        ids=None,
        logprobs=logprobs,
        tail_logprob=np.full(len(stated), -np.inf, np.float32),
        token_logprob=logprobs[np.arange(len(stated)), GOLD.clip(0)],
        entropy=-(stated * logprobs).sum(1),
    )


def test_each_teacher_is_judged_on_the_words_that_have_a_label() -> None:
    sure = full([[0.1, 0.8, 0.1], [0.8, 0.1, 0.1], [0.1, 0.1, 0.8]])
    unsure = full([[0.5, 0.3, 0.2], [0.3, 0.4, 0.3], [0.5, 0.3, 0.2]])
    tally = Tally(classes=True, entities=Entities.of(["O", "B-NAME", "I-NAME"]))
    said = Said(targets={"sure": sure, "unsure": unsure}, shares=SHARES)
    measured = partial(measure_teacher, tokens=torch.from_numpy(GOLD))

    found = said.count(b"text", tally, measured, outcomes=GOLD)

    expected = [-0.25 * np.log(0.8) - 0.75 * np.log(0.3), -np.log(0.8)]
    assert found["cross_entropy"].tolist() == pytest.approx(expected, abs=1e-6)
    entropy = (SHARES * [sure.entropy, unsure.entropy]).sum(0)
    assert found["entropy"].tolist() == pytest.approx(entropy.tolist())
    results = {name: one.results() for name, one in tally.teachers.items()}
    assert [results[name]["entity_f1"] for name in ("sure", "unsure")] == [1.0, 0.0]
    assert not len(tally.entities or ())
