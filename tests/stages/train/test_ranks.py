"""Several ranks train as one does: losses, batches, students.

What would be silently wrong is seen.
"""

import random
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ranked import (
    Case,
    Seen,
    Trainings,
    alone,
    off,
    student_of,
    told,
    trained_by,
    trained_until_one_dies,
)
from safetensors.torch import save_file
from tiny_store import random_texts
from together import together
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from stillroom.stages.loader.parts import part_of
from stillroom.stages.loader.samples import Sample
from stillroom.stages.models.fit.misfits import refuse_shared_norms
from stillroom.stages.models.students.student import refuse_norms
from stillroom.stages.train.together.choice import memory
from stillroom.stages.train.together.gradients import refuse_changed
from stillroom.stages.train.together.smaller import OutOfMemory, leave, smaller
from stillroom.stages.workers.ranks import Ranks
from stillroom.storage.errors import NotTogether, UsageError
from stillroom.storage.files.local import LocalFiles

pytestmark = pytest.mark.numeric

TIED = {"config": {"num_hidden_layers": 2, "tie_word_embeddings": True}}
DEEP = {"config": {"num_hidden_layers": 8}}
SIXTY = {"tokens": 5900, "evaluate_every_tokens": 2000, "validate": True}
SAME = 1e-5
"""Of the loss of a step, as rounding leaves it; of a gradient's norm a hundred times as much,
relative."""


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    return Trainings(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def cases(trainings: Trainings) -> list[Case]:
    """All in one pair of processes."""
    made = trainings
    return [
        made.causal("ddp", "ddp", **SIXTY),
        made.causal("fsdp2 tied", "fsdp2", student=TIED, full=True, **SIXTY),
        made.lora("lora ddp", "ddp"),
        made.lora("lora fsdp2", "fsdp2", gradient_checkpointing=True),
        made.sampled("sampled", "fsdp2"),
        made.features("features ddp", "ddp"),
        made.features("features fsdp2", "fsdp2"),
        made.classes("classes ddp", "ddp"),
        made.classes("classes fsdp2", "fsdp2"),
        made.causal("one sample a step, ddp", "ddp", tokens_per_step=1, tokens=150),
        made.causal("one sample a step, fsdp2", "fsdp2", tokens_per_step=1, tokens=150),
        made.causal("deep", "fsdp2", student=DEEP),
        made.causal("no room", "ddp", wrong="out of memory"),
        made.causal("sent each pass", "fsdp2", wrong="sent each pass"),
        made.causal("averaged", "fsdp2", wrong="averaged"),
        made.causal("own divisor", "fsdp2", wrong="own divisor"),
        made.causal("body alone", "fsdp2", student=TIED, wrong="body alone"),
        made.causal("one group", "fsdp2", student=DEEP, wrong="one group"),
    ]


@pytest.fixture(scope="module")
def seen(cases: list[Case]) -> dict[str, list[Seen]]:
    """What each rank saw."""
    found = together(trained_by, cases, ranks=2)
    return {case.name: list(of) for case, of in zip(cases, zip(*found, strict=True), strict=True)}


def test_two_ranks_train_as_one(cases: list[Case], seen: dict[str, list[Seen]]) -> None:
    for case in (case for case in cases if not case.wrong):
        one, (first, second) = alone(case), seen[case.name]
        losses, norms = off(first, one)
        assert losses < SAME, case.name
        assert norms < 100 * SAME, case.name
        assert first.losses == second.losses, case.name
        for mine, others, all_of_them in zip(first.taken, second.taken, one.taken, strict=True):
            assert sorted(mine + others) == sorted(all_of_them), case.name
    assert len(seen["ddp"][0].losses) >= 60
    assert len(seen["fsdp2 tied"][0].losses) >= 60
    assert any(not part for part in seen["one sample a step, fsdp2"][1].taken)


@pytest.mark.parametrize("name", ["ddp", "fsdp2 tied", "lora ddp", "lora fsdp2"])
def test_the_student_and_its_record_are_those_of_one_rank(
    cases: list[Case], seen: dict[str, list[Seen]], name: str
) -> None:
    (case,) = (case for case in cases if case.name == name)
    several, one = told(case), told(case, by_one=True)
    both = [
        AutoModelForCausalLM.from_pretrained(student_of(case, by_one=which))
        for which in (False, True)
    ]
    assert type(both[0]) is type(both[1])
    for text in random_texts(60)[:12]:
        found, right = (model(input_ids=torch.tensor([text])).logits for model in both)
        torch.testing.assert_close(found, right, rtol=0, atol=1e-4)
    for field in (
        "tokens",
        "scored_tokens",
        "samples",
        "steps",
        "parameters",
        "trained_parameters",
    ):
        assert several[field] == one[field], field
    for found, right in zip(several["validation"], one["validation"], strict=True):
        assert found["loss"] == pytest.approx(right["loss"], abs=SAME)
    assert bool(several["validation"]) == (name in ("ddp", "fsdp2 tied"))
    assert (student_of(case).parent / "adapter").exists() == ("lora" in name)


@pytest.mark.parametrize("name", ["averaged", "own divisor", "body alone"])
def test_what_is_silently_wrong_would_be_seen(
    cases: list[Case], seen: dict[str, list[Seen]], name: str
) -> None:
    """Each gives losses without an error; the comparison of the first test tells."""
    (case,) = (case for case in cases if case.name == name)
    right = alone(Case(name=name, job=case.job))
    found = seen[name][0]
    steps = len(found.losses)
    assert steps > 1, found.error
    pairs = zip(found.losses, found.norms, right.losses[:steps], right.norms[:steps], strict=True)
    assert any(abs(a - b) > SAME or abs(n / m - 1) > 100 * SAME for a, n, b, m in pairs)


def test_gradients_may_be_sent_after_each_pass(
    cases: list[Case], seen: dict[str, list[Seen]]
) -> None:
    (case,) = (case for case in cases if case.name == "sent each pass")
    losses, norms = off(seen["sent each pass"][0], alone(Case(name="one", job=case.job)))
    assert losses < SAME
    assert norms < 100 * SAME


def test_no_rank_ever_has_the_whole_model(cases: list[Case], seen: dict[str, list[Seen]]) -> None:
    """At most its shards, and whole the root's group and two blocks of eight."""
    (case,) = (case for case in cases if case.name == "deep")
    model = AutoModelForCausalLM.from_pretrained(student_of(case))
    sizes = {name: 4 * p.numel() for name, p in model.named_parameters()}
    whole = sum(sizes.values())
    blocks = sum(size for name, size in sizes.items() if ".layers." in name)
    most = (whole + (whole - blocks) + 2 * blocks / 8) / 2
    assert whole / 2 < seen["deep"][0].most_bytes <= 1.05 * most < 0.8 * whole
    assert seen["one group"][0].most_bytes >= whole


def test_all_ranks_halve_their_passes_where_one_runs_out_of_memory(
    cases: list[Case], seen: dict[str, list[Seen]]
) -> None:
    (case,) = (case for case in cases if case.name == "no room")
    first, second = seen["no room"]
    assert not first.error
    assert off(first, alone(Case(name="no room", job=case.job)))[0] < SAME
    for rank in (first, second):
        assert any("out of memory: passes now hold" in line for line in rank.said)


def test_a_sharded_rank_without_memory_leaves_a_size_for_the_next_start(
    trainings: Trainings,
) -> None:
    case = trainings.causal("dies", "fsdp2", wrong="out of memory")
    first, second = (of[0] for of in together(trained_until_one_dies, [case], ranks=2))
    assert second.error.startswith("OutOfMemory: train: rank 1 of 2 ran out of memory (made up)")
    assert first.error
    folder = case.job["train_dirs"]["student"]
    assert 0 < int((folder / "tokens_per_pass").read_text()) < 40
    again = Case(name="again", job=case.job)
    (first,), _ = together(trained_by, [again], ranks=2)
    assert off(first, alone(again))[0] < SAME


def sample(number: int, tokens: int) -> Sample:
    ids = np.zeros(tokens, np.int32)
    return Sample(token_ids=ids, spans=np.array([[1, tokens - 1]]), targets=None, number=number)


@pytest.mark.parametrize("group", [None, 1, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_ranks_share_a_step_by_whole_groups(group: int | None, count: int) -> None:
    draw = random.Random(f"{group} {count}")
    for _ in range(50):
        step = [sample(n, draw.randint(2, 60)) for n in range(draw.randint(1, 30))]
        parts = [part_of(step, Ranks(rank=r, count=count), group=group) for r in range(count)]
        numbers = [[one.number for one in part] for part in parts]
        assert sorted(chain(*numbers)) == list(range(len(step)))
        assert all(part == sorted(part) for part in numbers)
        units = [step[start : start + (group or 1)] for start in range(0, len(step), group or 1)]
        for unit in units:
            assert sum({one.number for one in unit} <= set(part) for part in numbers) == 1
        tokens = [sum(map(len, part)) for part in parts]
        assert max(tokens) - min(tokens) <= max(sum(map(len, unit)) for unit in units)


def test_memory_is_shared_by_the_ranks_of_a_sharded_student_alone() -> None:
    student: Any = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            vocab_size=20,
        )
    )
    numbers = sum(p.numel() for p in student.parameters())
    whole = memory(student, "ddp", ranks=4, positions=10)
    shared = memory(student, "fsdp2", ranks=4, positions=10)
    assert (whole.state, whole.whole, shared.state) == (16 * numbers, 0, 4 * numbers)
    assert whole.activations == shared.activations == 4 * 10 * 3 * (16 * 8 + 4 * 16)
    assert memory(student, "ddp", ranks=4, positions=10, half=True).logits == 2 * 10 * 20
    student.requires_grad_(requires_grad=False)
    assert memory(student, "ddp", ranks=4, positions=10).state == 4 * numbers
    user = nn.Linear(2, 2)
    user.config = student.config  # type: ignore[assignment]
    assert memory(user, "ddp", ranks=2, positions=1).state == 16 * 6


def test_batch_norms_are_refused_by_name() -> None:
    student = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with pytest.raises(UsageError, match=r"1 of the student is a batch norm.*processes to 1"):
        refuse_norms(student)
    refuse_norms(student[0])


def test_averages_of_the_student_s_own_code_are_refused_by_name() -> None:
    before, now = ({"mean": torch.full((2,), value)} for value in (0.0, 1.0))
    others = SimpleNamespace(count=2, all=lambda mine: [["mean"], mine])
    for ranks, seen in ((Ranks(), now), (Ranks(count=2), {})):
        refuse_changed({} if not seen else before, seen, ranks)
    for seen in (before, now):  # a rank without a pass raises it as well
        with pytest.raises(NotTogether, match=r"changes mean of the student.*processes to 1"):
            refuse_changed(before, seen, others)  # type: ignore[arg-type]


def test_batch_norms_are_refused_before_the_teachers_work_where_files_show_them(
    tmp_path: Path,
) -> None:
    tensors = {"embedder.norm.running_mean": torch.zeros(2), "embedder.weight": torch.zeros(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=r"embedder\.norm of the student is a batch norm"):
        refuse_shared_norms(tmp_path, 2)
    for allowed in (1, "auto"):
        refuse_shared_norms(tmp_path, allowed)


def test_what_is_left_for_the_next_start_is_a_hint(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    assert smaller(files, 100) == 100
    leave(files, OutOfMemory(50, "made up", Ranks(rank=1, count=2)))
    assert [smaller(files, tokens) for tokens in (100, 20)] == [50, 20]
    (tmp_path / "tokens_per_pass").write_text("5")
    (tmp_path / "tokens_per_pass").write_text("x")
    assert smaller(files, 100) == 100
