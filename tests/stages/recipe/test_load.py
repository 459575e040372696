"""Recipes: every mistake gets its file, line, dotted path and a way out.

Every shipped recipe is valid.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from kit import recipe_tree

from stillroom.stages.recipe.engines import PRICES
from stillroom.stages.recipe.load import _keys_at, changed_fields, load_recipe, recorded
from stillroom.stages.recipe.reading.outside import OUTSIDE
from stillroom.stages.recipe.sections import Recipe
from stillroom.storage.errors import UsageError

RECIPES = sorted((Path(__file__).parents[3] / "pipeline" / "recipes").glob("*.yaml"))


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    return recipe_tree(tmp_path, tmp_path / "teacher", tmp_path / "prompts.jsonl")


def refusal(tmp_path: Path, tree: dict[str, Any], *overrides: str) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    with pytest.raises(UsageError) as caught:
        load_recipe(path, list(overrides))
    return str(caught.value)


def test_a_misspelt_key_is_refused_with_line_and_nearest_key(
    tmp_path: Path, tree: dict[str, Any]
) -> None:
    tree["train"]["learning_rat"] = 1
    message = refusal(tmp_path, tree)
    line = next(
        i
        for i, text in enumerate((tmp_path / "recipe.yaml").read_text().splitlines(), 1)
        if "rat:" in text
    )
    assert message == (
        f"{tmp_path}/recipe.yaml:{line}: train.learning_rat: unknown key. Did you mean "
        "'learning_rate'?"
    )


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("score.k=0", "score.k: must be at least 1 (got 0)"),
        ("score.k=many", "score.k: input should be a valid integer"),
        (
            "compute.workers=0",
            "compute.workers: must be auto, or a whole number from 1 to 100000 (got 0)",
        ),
        ("compute.workers=100001", "a whole number from 1 to 100000 (got 100001)"),
        ("compute.processes=1025", "a whole number from 1 to 1024 (got 1025)"),
        ("compute.workers=all", "compute.workers: must be auto, or a whole number"),
        ("compute.processes=two", "compute.processes: must be auto, or a whole number"),
        ("score=64", "score: must be a section, with keys of engine, engine_args, targets, k"),
        ("generate.keep=20", "generate.keep: must be a section, with keys of k (got 20)"),
        ("generate.keep={k:20}", "generate.keep.k:20: unknown key. A space follows a colon"),
        ("data.format=chats", "data.format: must be one of 'text'"),
        ("data.holdout=-1", "data.holdout: must be at least 0 (got -1)"),
        ("generate.top_p=0", "generate.top_p: must be greater than 0"),
        ("storage.mantissa_bits=24", "storage.mantissa_bits: must be at most 23"),
        ("train.warmup_fraction=1", "train.warmup_fraction: must be less than 1"),
        ("train.tokens=1000", "give either `tokens` or `epochs`"),
        ("student.model=x", "name either `model`"),
        ("teacher=null", "teacher: missing"),
        ("train=null", "train: missing, and there is a section `student`"),
        ("student=null", "student: missing, and there is a section `train`"),
        ("data.format=text", "generate: format 'text' brings its own text"),
        (
            "data.chat_template_kwargs={tools: []}",
            "data.chat_template_kwargs: 'tools' is decided by the stages",
        ),
        (
            "data.chat_template_kwargs={max_length: 9}",
            "data.chat_template_kwargs: 'max_length' is the tokenizer's",
        ),
        ("generate={samples: 2, temperature: 0}", "generate.samples: 2 completions"),
        ("generate=null", "generate: missing: format 'prompt' has prompts only"),
        ("loss.soft_weight=0", ""),
        ("evaluate.generate={metric: regex}", "needs a `pattern`"),
        ("evaluate.generate={metric: regex, pattern: (}", "no regular expression"),
        (
            "data.chat_template_kwargs={date: 2024-07-26}",
            "data.chat_template_kwargs: holds a value that JSON does not",
        ),
        (
            "data.chat_template_kwargs={a: [.inf]}",
            "data.chat_template_kwargs: holds a value that JSON does not",
        ),
        (
            "generate.engine_args={since: 2024-07-26}",
            "generate.engine_args: holds a value that JSON does not",
        ),
        ("student.config={since: 2024-07-26}", "student.config: holds a value that JSON does not"),
        (
            "generate.temperature=.inf",
            "generate.temperature: input should be a finite number (got inf)",
        ),
        (
            "train.learning_rate=.nan",
            "train.learning_rate: input should be a finite number (got nan)",
        ),
        ("train.betas=[0.9, .inf]", "train.betas.1: input should be a finite number"),
        (
            "data.columns={refrence: a}",
            "data.columns: unknown name 'refrence'. Known for format 'prompt': prompt, ref",
        ),
        ("data.turns=all", "data.turns: format 'prompt' has no turns. Remove it"),
        ("score.p=0.9", "score.p: belongs to targets 'topp'; this recipe has 'topk'"),
        ("score.k_min=2", "score.k_min: belongs to targets 'topp'"),
        ("score.rounds=9", "score.rounds: belongs to targets 'sampled'"),
        ("score.draw=systematic", "score.draw: belongs to targets 'sampled'"),
        ("score.proposal=0.5", "score.proposal: belongs to targets 'sampled'"),
        (
            "score={targets: sampled, k: 9}",
            "score.k: belongs to targets 'topk' and 'topp'; this recipe has 'sampled'",
        ),
        (
            "score={targets: sampled, temperatures: [1, 2]}",
            "score.temperatures: sampled targets are drawn at one temp",
        ),
        (
            "score={targets: topp}",
            "score.p: missing: targets 'topp' keeps the fewest entries that hold a mass of p",
        ),
        (
            "score={targets: topp, p: 0.9, k: 4, k_min: 5}",
            "score.k_min: 5 entries at least are more than score.k, 4",
        ),
        ("score.temperatures=[]", "score.temperatures: "),
        ("score.temperatures=[1, 0]", "score.temperatures.1: must be greater than 0"),
    ],
)
def test_bad_values_are_refused_by_name(
    tmp_path: Path, tree: dict[str, Any], override: str, expected: str
) -> None:
    if not expected:
        tree["loss"]["hard_weight"] = 0
        expected = "nothing to learn"
    assert expected in refusal(tmp_path, tree, override)


def test_what_the_command_line_sets_is_blamed_on_it_and_null_is_the_default(
    tmp_path: Path, tree: dict[str, Any]
) -> None:
    assert refusal(tmp_path, tree, "score.k=0") == "--set score.k: must be at least 1 (got 0)."
    tree["score"] = {"targets": "topk", "k": 16}
    assert "recipe.yaml:" in refusal(tmp_path, tree, "score.targets=sampled")
    recipe = load_recipe(tmp_path / "recipe.yaml", ["score.targets=sampled", "score.k=null"])
    assert (recipe.score.targets, recipe.score.k) == ("sampled", 64)  # type: ignore[union-attr]
    assert "unknown key" in refusal(tmp_path, tree, "score.kk=null")


def test_conversations_can_bring_their_own_answers(tmp_path: Path, tree: dict[str, Any]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert load_recipe(path, ["data.format=messages", "generate=null"]).generate is None


def test_a_store_stands_for_teacher_and_data_or_for_neither(
    tmp_path: Path, tree: dict[str, Any]
) -> None:
    for field in ("teacher.model", "data.source"):
        assert f"{field}: names a store" in refusal(
            tmp_path, tree, "storage.sources=[x]", f"{field}=x"
        )


def test_stage_one_alone_says_nothing_of_a_student(tmp_path: Path, tree: dict[str, Any]) -> None:
    """How many held-out tokens get reference targets is stage one's to say.

    The sections of a student may stand there empty.
    """
    del tree["student"], tree["train"]
    tree["evaluate"] = {"tokens": 50}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert load_recipe(path, ["loss={}"]).student is None
    # Drawn targets ask for a loss temperature, which is not there.
    load_recipe(path, ["score={targets: sampled, temperatures: [2.0]}"])
    for setting in ("loss.hard_weight=0", "evaluate.baseline=true", "compute.processes=2"):
        said = refusal(tmp_path, tree, setting)
        field = setting.partition("=")[0]
        assert said == (
            f"--set {field}: has no meaning without `student` and `train`. Remove it, or add them"
        )


def test_every_mistake_is_listed_at_once(tmp_path: Path, tree: dict[str, Any]) -> None:
    tree["score"]["k"], tree["train"]["tokns"] = 0, 1
    assert len(refusal(tmp_path, tree).splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "holds nothing, expected sections"),
        ("run: [", "not YAML"),
        ("- 1", "holds a list, expected sections"),
        ("run: {dir: a}\nrun: {dir: b}", ":2: run: given twice"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UsageError, match=expected):
        load_recipe(tmp_path / "r.yaml")


def test_a_file_that_is_not_utf8_is_named_so(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"run: \xff")
    with pytest.raises(UsageError, match=r"not text in UTF-8.*save it as UTF-8"):
        load_recipe(tmp_path / "r.yaml")


def test_a_missing_file_names_init(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="stillroom init"):
        load_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    "override", ["train", "train=1", "=3", "train.=2", "train.x.y=1", "run.seed=["]
)
def test_a_malformed_override_is_refused(
    tmp_path: Path, tree: dict[str, Any], override: str
) -> None:
    assert refusal(tmp_path, tree, override)


def test_environment_variables_are_expanded_or_named(
    tmp_path: Path, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tree["teacher"]["model"] = "${MODELS}/teacher"
    assert "environment variable MODELS is not set" in refusal(tmp_path, tree)
    monkeypatch.setenv("MODELS", "/models")
    assert load_recipe(tmp_path / "recipe.yaml").teacher.model == "/models/teacher"


def test_a_variable_stands_only_where_a_place_is_named(
    tmp_path: Path, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "the-secret-itself")
    tree["train"]["wandb"] = "${SECRET}"
    said = refusal(tmp_path, tree)
    assert "train.wandb: '${SECRET}' holds an environment variable" in said
    assert "the-secret-itself" not in said


def test_what_looks_like_a_variable_and_is_none_is_text(
    tmp_path: Path, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("END", raising=False)
    tree["generate"]["stop"] = ["${END}"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.generate is not None
    assert recipe.generate.stop == ["${END}"]
    monkeypatch.setenv("END", "stop")
    assert "generate.stop: '${END}' holds an environment variable" in refusal(tmp_path, tree)


def test_records_keep_the_variable(
    tmp_path: Path, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AT", "x")
    tree["teacher"]["model"], tree["storage"]["sources"] = "${AT}", ["s3://k:v@b/${AT}"]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    recipe = load_recipe(path)
    assert recipe.storage.sources == ["s3://k:v@b/x"]
    assert recorded(recipe)["teacher"]["model"] == "${AT}"
    assert recorded(recipe)["storage"]["sources"] == ["s3://b/${AT}"]
    assert "compute" not in recorded(recipe)  # what a machine has is nobody else's business


def test_what_is_recorded_of_a_budget_is_a_recipe(tmp_path: Path, tree: dict[str, Any]) -> None:
    prices = dict.fromkeys(PRICES, 1.0)
    budget = {"max_usd": 5.0, "accept_partial": True}
    endpoint = {"engine": "openai", "model": "m", "base_url": "https://a.example/v1"}
    tree["generate"] = endpoint | prices | budget
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    kept = recorded(load_recipe(path))
    assert not {*prices, *budget} & kept["generate"].keys()
    assert Recipe.model_validate(kept).generate is not None


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_shipped_recipes_are_valid_and_open_with_their_command(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STILLROOM_ASSETS", "/assets")
    monkeypatch.setenv("STILLROOM_DEMO", "/demo")
    assert isinstance(load_recipe(path), Recipe)
    head = path.read_text().split("\nrun:")[0]
    assert "stillroom " in head
    assert all(line.startswith("#") or not line for line in head.splitlines())


def test_changed_fields_names_what_differs() -> None:
    old = {"train": {"learning_rate": 0.1, "tokens": 5}, "loss": {"tail": "bucket"}}
    new = {"train": {"learning_rate": 0.2, "tokens": 5}, "loss": {"tail": "bucket"}}
    assert changed_fields(old, new) == ["train.learning_rate: 0.1 -> 0.2"]


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("loss.alpha=0.5", "loss.soft_weight of the divergence (the teacher), loss.hard_weight"),
        ("loss.kd_ratio=0.5", "loss.soft_weight"),
        ("loss.hidden_weight=1", "loss.features"),
        (
            "student.lora={lora_alpha: 32}",
            "student.lora.scale is what the update is multiplied by: lora_alpha / r",
        ),
        ("student.lora={r: 8}", "unknown key. Write student.lora.rank."),
        ("train.batch_size=8", "train.tokens_per_step"),
        ("train.gradient_accumulation_steps=8", "train.tokens_per_step"),
        ("train.num_train_epochs=3", "train.epochs"),
        ("train.lr=0.1", "train.learning_rate"),
        ("train.temperature=2", "loss.temperature"),
        ("data.max_length=512", "data.max_tokens"),
        ("generate.max_length=512", "unknown key. Write generate.max_tokens."),
        ("score.batch_size=8", "Did you mean 'batch_tokens'?"),
    ],
)
def test_what_other_tools_call_it_points_to_the_right_field(
    tmp_path: Path, tree: dict[str, Any], key: str, named: str
) -> None:
    tree["student"] = {"model": "x", "lora": {}}
    where = key.partition("=")[0] + (
        ".lora_alpha" if "lora_alpha" in key else ".r" if "{r:" in key else ""
    )
    (line,) = refusal(tmp_path, tree, key).splitlines()
    assert line.startswith(f"--set {where}: unknown key. ")
    assert named in line


@pytest.mark.parametrize(
    ("override", "named"),
    [
        (
            "train.online=true",
            "live distillation. The teacher is never in the training loop: score",
        ),
        ("teacher.live=true", "live distillation"),
        ("loss.divergence=mutual", "mutual distillation. Students do not teach one another"),
        ("students=[a, b]", "mutual distillation"),
        ("teacher.trainable=true", "dynamic teachers. A teacher does not change while it teaches"),
        ("train.ema_decay=0.99", "dynamic teachers"),
        (
            "loss.gradient_weight=1",
            "gradient alignment. No gradient of the teacher is stored: loss",
        ),
        ("loss.features=[{match: jacobian}]", "gradient alignment"),
        ("run.task=image-text-to-text", "cross-modal teachers. Teacher and student read the same"),
        ("teacher.modality=image", "cross-modal teachers"),
        ("student.tokenizer=x", "teachers of other vocabularies. Teacher and student share a"),
        ("loss.divergence=ULD", "teachers of other vocabularies"),
        ("train.lmbda=0.5", "on-policy rounds. A round is a run: generate"),
        ("student.dtype=int8", "pruning and quantised students. A teacher may be quantised"),
        ("teacher.data_free=true", "data-free distillation"),
    ],
)
def test_what_is_outside_is_said_with_what_is_offered_in_its_place(
    tmp_path: Path, tree: dict[str, Any], override: str, named: str
) -> None:
    (line,) = refusal(tmp_path, tree, override).splitlines()
    assert f"Not supported: {named}" in line
    assert line.startswith(f"--set {override.partition('=')[0]}")


def test_words_of_the_field_for_what_there_is_point_to_it(
    tmp_path: Path, tree: dict[str, Any]
) -> None:
    said = "unknown key. The student of one run is the teacher of the next: teacher: {model: 'run:"
    assert said in refusal(tmp_path, tree, "train.born_again=2")
    assert "unknown key. Leave the section `score` out" in refusal(tmp_path, tree, "seq_kd=true")


def test_what_is_outside_is_no_field_and_stands_in_the_limits() -> None:
    limits = RECIPES[0].parents[2].joinpath("README.md").read_text().partition("## Limits")[2]
    for line in OUTSIDE:
        assert line.name in " ".join(limits.split())
        for key in line.keys.split():
            section, _, name = key.rpartition(".")
            known = _keys_at((section,) if section else ())
            assert name not in known


def test_every_setting_that_is_offered_in_place_is_in_the_recipe() -> None:
    """`section: {field: ...}` and `section.field` of a sentence."""
    for line in OUTSIDE:
        named = re.findall(r"\b([a-z]+)(?:: \{|\.)([a-z_]+)", line.instead)
        for section, name in named:
            if section in Recipe.model_fields:
                assert name in _keys_at((section,)), line.instead
