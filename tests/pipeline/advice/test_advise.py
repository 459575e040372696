"""Each advice fires on a planted case and is silent on a good run.

Plan, status, run and report say the same.
"""

import math
import random
import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import reports
import yaml
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from kit import last_json, prompts, recipe_tree, stillroom, told, write_jsonl, write_recipe
from tiny_llama import save_tiny_llama

from stillroom.pipeline.advice.advise import advise, of_report
from stillroom.pipeline.advice.remedy import more_entries
from stillroom.pipeline.advice.table import RULES, Advice
from stillroom.pipeline.report.report import load_report, page
from stillroom.stages.recipe.load import load_recipe, recorded
from stillroom.storage.errors import UsageError
from stillroom.storage.store.store import Store

Run = dict[str, Any]


def curve(loss: Callable[[float], float], *, noise: float = 0.01, points: int = 200) -> list[Run]:
    """A history: the loss as a function of the share of the training, with noise of batches.

    Norms that vary by two.
    """
    drawn = random.Random(7)
    return [
        {
            "tokens": 2_000 * (n + 1),
            "loss": loss(n / points) * (1 + drawn.gauss(0, noise)),
            "soft": loss(n / points),
            "hard": 3.0,
            "learning_rate": 1e-3,
            "grad_norm": 0.2 * drawn.uniform(1, 2),
        }
        for n in range(points)
    ]


def settled(done: float) -> float:
    """A loss that has come to rest."""
    return 0.8 + 2.2 * math.exp(-8 * done)


def good() -> Run:
    """The facts of a run that nothing is to be said of."""
    recipe = deepcopy(reports.RECIPE)
    recipe["train"] = {
        "epochs": 4.0,
        "tokens": None,
        "learning_rate": 3e-3,
        "warmup_fraction": 0.05,
    }
    recipe["evaluate"] = {"source": None, "split": None}
    turned = {"angle_degrees": 12.0, "norm_ratio": 1.0, "tokens": 6_000}
    held = {"entries": 64.0, "mass": 0.97, "enough": 20, "positions": 512}
    judged = reports.evaluation() | {"gradient": {"student_before": {**turned}, "student": turned}}
    return {
        "recipe": recipe,
        "stages": {
            "data": {"rows": 5_000, "rejected": 50, "pending": 0, "why": ""},
            "score": {
                "rows": 990,
                "rejected": 9,
                "pending": 1,
                "why": "9 rejected: x",
                "held": held,
            },
        },
        "records": {arm: {"history": curve(settled)} for arm in ("student", "baseline")},
        "evaluation": deepcopy(judged),
    }


def advised(run: Run) -> list[Advice]:
    return advise(
        run["recipe"],
        stages=run["stages"],
        records=run["records"],
        evaluation=run["evaluation"],
    )


def with_curve(found: list[Run]) -> Callable[[Run], None]:
    return lambda run: run["records"]["student"].update(history=found)


def with_norm(norm: float, name: str = "grad_norm_most") -> Callable[[Run], None]:
    def plant(run: Run) -> None:
        run["records"]["student"]["history"][120][name] = norm

    return plant


def with_angle(angle: float) -> Callable[[Run], None]:
    return lambda run: run["evaluation"]["gradient"]["student"].update(angle_degrees=angle)


def with_gap(gap: float, error: float) -> Callable[[Run], None]:
    difference = reports.difference(gap, error)
    return lambda run: run["evaluation"]["differences"].update(baseline=difference)


def with_start(kl: float) -> Callable[[Run], None]:
    return lambda run: run["evaluation"]["results"]["student_before"].update(kl_teacher=kl)


def with_mass(mass: float, enough: int | None) -> Callable[[Run], None]:
    return lambda run: run["stages"]["score"]["held"].update(mass=mass, enough=enough)


def with_rejects(run: Run) -> None:
    run["stages"]["score"] |= {"rejected": 40, "why": "40 rejected: too_long"}


PLANTED: list[tuple[str, Callable[[Run], None], tuple[str, ...]]] = [
    ("kept_mass", with_mass(0.54, 393), ("54 %", "score.targets: sampled", "score.k: 400,")),
    ("kept_mass", with_mass(0.899, None), ("90 %", "sampled")),
    ("rejects", with_rejects, ("40 of 1,031", "3.9 %", "too_long")),
    ("gradient_angle", with_angle(107.0), ("107 degrees", "6,000 tokens", "sampled")),
    ("gradient_norm", with_norm(7.5), ("7.5", "242,000 tokens", "learning_rate: 1.0e-03")),
    ("gradient_norm", with_norm(math.nan, "grad_norm"), ("nan", "no number")),
    ("gradient_norm", with_norm(math.inf), ("inf", "no number")),
    (
        "still_falling",
        with_curve(curve(lambda done: 3 * (done + 0.005) ** -0.5)),
        ("%", "train.epochs: 8"),
    ),
    (
        "rate_too_high",
        with_curve(curve(lambda done: 3.0 + 2 * min(1, 8 * done) * math.exp(-3 * done))),
        ("the loss rose from", "learning_rate: 1.0e-03"),
    ),
    (
        "rate_too_low",
        with_curve(curve(lambda done: 3.0 - 0.02 * done, noise=0.002)),
        ("learning_rate: 9.0e-03",),
    ),
    ("learned_nothing", with_start(0.3122), ("0.3121 nats", "0.3122", "train.epochs: 40,")),
    ("worse", with_gap(0.02, 0.005), ("KL to the teacher is 0.020 nats worse", "error 0.005")),
    ("too_few_tokens", with_gap(-0.02, 0.03), ("100,123 held-out", "data.holdout: 2400")),
]


@pytest.mark.parametrize(("name", "plant", "says"), PLANTED)
def test_each_fires_on_a_planted_case(
    name: str, plant: Callable[[Run], None], says: tuple[str, ...]
) -> None:
    run = good()
    plant(run)
    found = advised(run)
    assert [one.name for one in found] == [name]
    line = found[0].line()
    assert all(words in line for words in says), line
    assert set(found[0].json()) == {"name", "about", "found", "reason", "do"}


def test_of_a_student_that_learned_nothing_one_advice_is_enough() -> None:
    """It is worse for that, and its curve did not move either."""
    run = good()
    with_start(0.3122)(run)
    with_gap(0.2, 0.005)(run)
    with_curve(curve(lambda done: 3.0 - 0.02 * done, noise=0.002))(run)
    assert [one.name for one in advised(run)] == ["learned_nothing"]


def test_every_line_of_the_table_has_a_planted_case() -> None:
    assert {name for name, _, _ in PLANTED} == set(RULES)


ENTRIES = st.sampled_from([{"targets": "topk"}, {"targets": "topp", "p": 0.7, "k_min": 2}])
LOSSES = st.sampled_from(
    [
        {},
        {"divergence": "reverse_kl"},
        {"tail": "drop"},
        {"tail": "renormalize"},
        {"tail": "to_label"},
    ]
)
KEEPS = st.sampled_from([None, {"k": 20}, {"k": 200}])
ENGINES = st.sampled_from(
    [{"engine": "hf"}, {"engine": "openai", "base_url": "http://localhost:1/v1", "model": "m"}]
)
LENGTHS = st.sampled_from([{"epochs": 1.5}, {"tokens": 7_000}])
HELD_OUT = st.sampled_from([{}, {"source": "mine.jsonl"}, {"source": "mine.jsonl", "limit": 40}])


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, Any]:
    """Recipes that load, of the kinds that advice looks at."""
    keep, evaluate = draw(KEEPS), draw(HELD_OUT)
    data = {"source": "p.jsonl", "format": "prompt"}
    data |= {} if evaluate else {"holdout": draw(st.sampled_from([40, 300]))}
    score = {**draw(ENTRIES), "k": draw(st.sampled_from([2, 20, 64]))}
    if draw(st.integers(0, 4)) == 0:
        keep, score = None, {"targets": "sampled", "rounds": 13}
    tree = recipe_tree(Path("x"), Path("t"), Path("p"), data=data, score=score)
    tree["generate"] = {**draw(ENGINES), "max_tokens": 9} | ({"keep": keep} if keep else {})
    tree |= {"loss": draw(LOSSES), "evaluate": evaluate}
    tree["train"] = draw(LENGTHS) | {"learning_rate": draw(st.floats(1e-6, 1.0))}
    return tree


SETTING = re.compile(r"((?:score|loss|train|data|evaluate|generate)(?:\.\w+)+): ([^\s,;]+)")
GONE = re.compile(r"without ((?:[a-z_]+\.\w+(?: and )?)+)")


@settings(max_examples=15, deadline=None)
@given(
    tree=recipes(), enough=st.sampled_from([None, 80, 393]), prompts=st.sampled_from([450, 10**6])
)
def test_what_each_advice_asks_for_is_a_recipe_that_loads(
    tree: dict[str, Any], enough: int | None, prompts: int
) -> None:
    """Each way that it names, as the command line takes it."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump(tree))
        try:
            recipe = load_recipe(path)
        except UsageError:
            reject()
        named = 0
        for name, plant, _ in PLANTED:
            run = good() | {"recipe": recorded(recipe)}
            plant(run)
            run["stages"]["data"]["rows"] = prompts
            if name == "kept_mass":
                run["stages"]["score"]["held"]["enough"] = enough
            for one in advised(run):
                for way in one.do.split(", or "):
                    changed = deepcopy(tree)
                    for gone in (
                        dotted for many in GONE.findall(way) for dotted in many.split(" and ")
                    ):
                        section, _, field = gone.partition(".")
                        changed[section].pop(field, None)
                    if "rows of your own in evaluate.source" in way:
                        changed["evaluate"]["source"] = "mine.jsonl"
                    path.write_text(yaml.safe_dump(changed))
                    asked = [f"{setting}={value}" for setting, value in SETTING.findall(way)]
                    load_recipe(path, asked)
                    named += len(asked)
        assert named > 5


def known_by_heart(run: Run) -> None:
    """A loss that falls and falls, on text that was read 400 times."""
    run["records"]["student"] = {
        "history": curve(lambda done: 3 * (done + 0.005) ** -0.5),
        "epochs": 400.0,
    }


QUIET: list[Callable[[Run], None]] = [
    lambda run: None,
    lambda run: run.update(evaluation=None, records={}),
    with_mass(0.9, 64),
    lambda run: run["recipe"].update(score=None),
    lambda run: run["stages"]["score"].pop("held"),
    with_angle(44.9),
    lambda run: run["evaluation"].update(gradient={"student": None}),
    with_norm(2.5),
    with_start(0.0),  # it began as its teacher
    with_gap(-0.001, 0.008),  # not told apart, and nothing that matters could hide there
    with_curve(curve(settled, noise=0.1)),
    with_curve(curve(lambda done: 3 * (done + 0.005) ** -0.5)[:29]),  # a few steps say nothing
    with_curve(curve(lambda done: 3.0 * 0.95**done, noise=0.05)),  # a fall within the noise
    known_by_heart,
]


@pytest.mark.parametrize("change", QUIET)
def test_a_good_run_hears_nothing(change: Callable[[Run], None]) -> None:
    run = good()
    change(run)
    assert [one.line() for one in advised(run)] == []


def test_what_drops_the_tail_is_told_to_keep_it_before_all_else() -> None:
    run = good()
    with_angle(59.0)(run)
    run["recipe"]["loss"]["tail"] = "drop"
    assert "loss.tail: bucket" in advised(run)[0].do
    run["recipe"]["loss"] |= {"tail": "bucket", "divergence": "reverse_kl"}
    assert advised(run)[0].do == "Set score.k: 256"
    run["recipe"]["score"] = {"targets": "sampled", "rounds": 13}
    assert "score.rounds: 52" in advised(run)[0].do


def test_small_steps_that_taught_nothing_are_to_be_larger() -> None:
    run = good()
    with_start(0.3122)(run)
    run["recipe"]["train"]["learning_rate"] = 2e-5
    assert "train.learning_rate: 2.0e-04," in advised(run)[0].do


def test_targets_that_lead_elsewhere_are_why_a_student_is_worse() -> None:
    run = good()
    with_gap(0.02, 0.005)(run)
    assert "learning_rate: 1.0e-03" in advised(run)[0].do
    with_angle(59.0)(run)
    angle, worse = advised(run)
    assert worse.name == "worse"
    assert worse.do == angle.do


def test_an_endpoint_is_asked_for_no_more_entries_than_it_gives() -> None:
    """Nor is its text read again: no more entries are advised than twenty."""
    endpoint: dict[str, Any] = {"engine": "openai", "keep": {"k": 5}}
    for engine, most in ((endpoint, 20), (endpoint | {"engine": "hf"}, 160)):
        for k in (20, 160):
            found = more_entries({"generate": engine}, {"score.k": k})
            kept = [one.changes.get("generate.keep.k") for one in found]
            assert kept == ([None, k] if k <= most else [None])


def test_shards_of_more_entries_say_nothing_of_fewer() -> None:
    run = good()
    del run["stages"]["score"]["held"]
    for entries, said in ((64.0, ["kept_mass"]), (90.0, [])):
        kept = {"tokens": 9, "entries_per_token": entries, "kept_mass": 0.8}
        run["stages"]["score"]["kept"] = {"topk": kept}
        assert [one.name for one in advised(run)] == said


def test_validation_that_was_best_before_the_end_asks_for_no_more_training() -> None:
    run = good()
    falling = curve(lambda done: 3 * (done + 0.005) ** -0.5)
    best = {"tokens": 200_000, "loss": 1.0}
    record = {"history": falling, "best": best, "validation": [best, best | {"tokens": 400_000}]}
    run["records"]["student"] = record
    assert advised(run) == []


def test_the_report_says_it_near_the_top_and_for_programs(tmp_path: Path) -> None:
    evaluation = good()["evaluation"]
    with_angle(107.0)({"evaluation": evaluation})
    recipe = good()["recipe"]
    facts = reports.facts()
    facts["stages"]["generate"]["rejected"] = 40
    facts["stages"]["generate"]["why"] = "40 rejected: <b>odd</b>"
    run = reports.finished(tmp_path / "run", evaluation, facts, recipe)
    report = load_report(run)
    names = [one["name"] for one in report["advice"]]
    assert names[0] == "rejects"
    assert names[-1] == "gradient_angle"
    assert [section.title for section in page(report).sections[:2]] == ["Advice", "Results"]
    for name, odd in (("report.md", r"\<b>odd"), ("report.html", "&lt;b&gt;odd")):
        text = (run / name).read_text()
        assert "107 degrees" in text
        assert odd in text
    assert of_report(report | {"settings": {}}) == []


def test_a_comparison_says_each_once_and_of_which_runs(tmp_path: Path) -> None:
    """Of seeds with the numbers of the first; what other recipes hear alike is not said again."""

    def made(name: str, seed: int, angle: float, k: int = 64, holdout: int = 200) -> Path:
        evaluation, recipe = good()["evaluation"], good()["recipe"]
        with_angle(angle)({"evaluation": evaluation})
        recipe["run"] |= {"seed": seed, "dir": name}
        recipe["score"]["k"], recipe["data"]["holdout"] = k, holdout
        return reports.finished(tmp_path / name, evaluation, reports.facts(), recipe)

    seeds = [made("a0", 0, 107.0), made("a1", 1, 103.0), made("a2", 2, 12.0)]
    others = [made("b", 0, 107.0, k=8), made("c", 0, 12.0, k=16), made("d", 0, 107.0, holdout=90)]
    page_file = tmp_path / "page.html"
    done = stillroom("report", *seeds, *others, "--out", page_file, "--json")
    found = last_json(done)["advice"]
    assert [one["name"] for one in found] == ["gradient_angle", "gradient_angle"]
    first, second = (one["runs"] for one in found)
    assert first == [str(seeds[0]), str(seeds[1]), str(others[2])]
    assert second == [str(others[0])]
    assert "without score.k" in found[1]["do"]
    section = done.stdout.split("## Advice")[1].split("##")[0]
    assert section.count("107 degrees") == 2
    assert f"The numbers are those of `{seeds[0]}`." in section
    assert "103 degrees" not in section
    assert page_file.read_text().count("107 degrees") == 2

    both = [made("e0", 0, 107.0, k=8), made("e1", 1, 107.0, k=8)]
    alike = stillroom("report", *both, "--out", page_file).stdout
    assert f"`{both[0]}` (2 seeds): **student: the gradient" in alike
    assert "The numbers are those of" not in alike
    silent = stillroom("report", seeds[2], others[1], "--out", page_file, "--json")
    assert last_json(silent)["advice"] == []
    assert "## Advice" not in silent.stdout


def test_the_whole_way_every_command_names_the_mass_and_the_k(tmp_path: Path) -> None:
    """The whole way with an unsure teacher of 32 ids and one entry stored.

    K for 0.9 is as an own sum over the stored rows has it.
    """
    sizes = {"hidden_size": 32, "intermediate_size": 64, "initializer_range": 0.2}
    teacher = save_tiny_llama(tmp_path / "teacher", **sizes)
    source = write_jsonl(tmp_path / "prompts.jsonl", prompts(24))
    recipe = write_recipe(tmp_path, teacher, source, score={"k": 1, "batch_tokens": 256})
    assert told("plan", recipe)["advice"] == []
    outcome = last_json(stillroom("run", recipe, "--json"))
    (said,) = [one for one in outcome["advice"] if one["name"] == "kept_mass"]

    rows = Store.open(tmp_path / "store").index("soft_targets", ["kind", "logprobs"]).to_pylist()
    whole = [row["logprobs"] for row in rows if row["kind"] == "full"]
    best = -np.sort(-np.exp(np.concatenate(whole).reshape(-1, 32)), axis=1)
    mass = best.mean(0).cumsum()
    enough = next(k for k in range(1, 33) if mass[k - 1] >= 0.9)
    assert 0.05 < mass[0] < 0.85
    assert said["found"].startswith(f"1 entry holds {100 * mass[0]:.0f} % of this teacher")
    assert f"score.k: {enough}, which holds 90 %" in said["do"]

    for command in ("plan", "status"):
        shown = told(command, recipe)
        assert shown["advice"] == outcome["advice"]
        assert f"advice: score: {said['found']}" in shown["above"]
    report = load_report(tmp_path / "run")
    assert report["advice"] == outcome["advice"]
    assert said["found"] in (tmp_path / "run" / "report.md").read_text()
    enough_asked = told("plan", recipe, "--set", f"score.k={enough}")
    assert "kept_mass" not in [one["name"] for one in enough_asked["advice"]]
