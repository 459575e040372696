"""Code that a model's folder brings along.

It is run for a teacher whose recipe says so by name, and never otherwise.
"""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from kit import prompts, stillroom, write_jsonl, write_recipe
from transformers import LlamaConfig

from stillroom.stages.models.causal_lm import KIND, load_causal_lm
from stillroom.stages.models.identity import FileHashes, identify
from stillroom.stages.models.inputs.rendering import Renderer
from stillroom.stages.recipe.load import load_recipe
from stillroom.storage.errors import UsageError
from stillroom.storage.store.store import Store

Folder = Callable[..., Path]
MODELING = """
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

Path({ran!r}).touch()


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """The file that is there once the model's own code was run."""
    return tmp_path / "ran"


@pytest.fixture
def own(tmp_path: Path, tiny_llama: Folder, ran: Path) -> Path:
    """A Llama by another name, whose class is in its folder.

    On standard input somebody says yes to everything.
    """
    folder = tiny_llama("own")
    named = {"AutoConfig": "OwnConfig", "AutoModelForCausalLM": "OwnForCausalLM"}
    _edit(
        folder / "config.json",
        model_type="own_llama",
        architectures=["OwnForCausalLM"],
        auto_map={auto: f"modeling_own.{name}" for auto, name in named.items()},
    )
    (folder / "modeling_own.py").write_text(MODELING.format(ran=str(ran)))
    return folder


@pytest.fixture(autouse=True)
def says_yes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))


def _edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _identity(folder: Path, tmp_path: Path, *, trusted: bool = False) -> Any:
    hashes = FileHashes(tmp_path / "none", remember=False)
    return identify(folder, dtype="auto", hashes=hashes, trusted=trusted)


@pytest.mark.parametrize("who", ["teacher", "author", "student"])
def test_nobody_s_code_is_run_unasked(
    tmp_path: Path, tiny_llama: Folder, own: Path, ran: Path, who: str
) -> None:
    source = write_jsonl(tmp_path / "p.jsonl", prompts(8))
    recipe = write_recipe(tmp_path, tiny_llama("good"), source)
    tree = yaml.safe_load(recipe.read_text())
    tree["teacher"]["trust_remote_code"] = who != "teacher"
    match who:
        case "teacher":
            tree["teacher"]["model"] = str(own)
        case "author":
            tree["generate"]["model"] = str(own)
            tree["teacher"]["trust_remote_code"] = False
        case "student":
            tree["teacher"]["model"], tree["student"] = str(own), {"model": str(own)}
    recipe.write_text(yaml.safe_dump(tree))
    for command in ("plan", "run"):
        assert "asks for code of its own" in stillroom(command, recipe, expect=2).stderr
    assert not ran.exists()


def test_code_of_a_teacher_that_may_run_it_is_said_first_and_part_of_who_it_is(
    tmp_path: Path, tiny_llama: Folder, own: Path, ran: Path
) -> None:
    source = write_jsonl(tmp_path / "p.jsonl", prompts(8))
    student = {"model": str(tiny_llama("student", seed=1))}
    score = {"k": 4, "features": [{"what": "hidden", "layers": [0, 1]}]}
    loss = {"features": [{"match": "hidden"}]}
    recipe = write_recipe(tmp_path, own, source, student=student, score=score, loss=loss)
    tree = yaml.safe_load(recipe.read_text())
    tree["teacher"]["trust_remote_code"] = True
    recipe.write_text(yaml.safe_dump(tree))
    first, *_ = stillroom("plan", recipe).stdout.splitlines()
    assert first.startswith(f"the code of {own} is run here")
    code_id = _identity(own, tmp_path, trusted=True).code_id
    assert "modeling_own.py" in first
    assert code_id in first
    assert not ran.exists()
    stillroom("run", recipe)
    assert ran.exists()
    assert Store.open(tmp_path / "store").commits("features"), "its blocks are captured as others'"
    (card,) = (tmp_path / "run").glob("train-*/student/README.md")
    assert f"its own code was run (`{code_id}`)" in card.read_text()
    before = _identity(own, tmp_path, trusted=True).id
    with (own / "modeling_own.py").open("a") as file:
        file.write("# another teacher\n")
    assert _identity(own, tmp_path, trusted=True).id != before


def test_code_that_no_hash_covers_is_refused(tmp_path: Path, own: Path, tiny_llama: Folder) -> None:
    with pytest.raises(UsageError, match="brings no code of its own"):
        _identity(tiny_llama("good"), tmp_path, trusted=True)
    generates = own / "custom_generate" / "generate.py"
    generates.parent.mkdir()
    generates.touch()
    with pytest.raises(UsageError, match="its own way of writing text"):
        _identity(own, tmp_path, trusted=True)
    generates.unlink()
    tokenizer = own / "tokenizer_config.json"
    whole = tokenizer.read_text()
    _edit(tokenizer, auto_map={"AutoTokenizer": ["modeling_own.Own", None]})
    with pytest.raises(UsageError, match="Take auto_map out of it"):
        _identity(own, tmp_path, trusted=True)
    tokenizer.write_text(whole)
    elsewhere = "somebody/code--modeling_own.OwnForCausalLM"
    _edit(own / "config.json", auto_map={"AutoModelForCausalLM": elsewhere})
    with pytest.raises(UsageError, match="another repository \\(somebody/code--"):
        _identity(own, tmp_path, trusted=True)


def test_code_of_a_tokenizer_is_never_run(tmp_path: Path, tiny_llama: Folder, ran: Path) -> None:
    """And what a model of a known class brings along beside it is not run either."""
    folder = tiny_llama("good")
    _edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "own.Own"})
    named = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / "custom_generate").mkdir()
    for file in ("own.py", "custom_generate/generate.py"):
        (folder / file).write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\n")
    load_causal_lm(_identity(folder, tmp_path))
    KIND.student(folder)
    _edit(folder / "tokenizer_config.json", **named)
    with pytest.raises(UsageError, match="which is never run"):
        Renderer(folder, {})
    assert not ran.exists()


def test_a_model_without_weights_asks_nobody() -> None:
    """The model is of a type that transformers does not know, whose class would be fetched.

    Standard input says yes.
    """

    class OwnConfig(LlamaConfig):
        model_type = "own_llama"

    config = OwnConfig(auto_map={"AutoModelForCausalLM": "somebody/code--own.Own"})
    asked = sys.stdin.tell()
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        KIND.empty(config)
    assert sys.stdin.tell() == asked


class _Runs:
    """What a pickle can do to whoever reads it."""

    def __init__(self, ran: Path) -> None:
        self._ran = ran

    def __reduce__(self) -> Any:
        return Path.touch, (self._ran,)


@pytest.mark.parametrize("load", ["teacher", "student"])
def test_a_pickle_of_weights_runs_nothing(
    tmp_path: Path, tiny_llama: Folder, ran: Path, load: str
) -> None:
    folder = tiny_llama("good")
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": _Runs(ran)}, folder / "pytorch_model.bin")
    identity = _identity(folder, tmp_path)
    with pytest.raises(UsageError, match="does not load"):
        load_causal_lm(identity) if load == "teacher" else KIND.student(folder)
    assert not ran.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert ran.exists()  # as it would have been


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"trust_remote_code": True}, "runs a model's own code"),
        ({"trust-remote-code": True}, "runs a model's own code"),
        ({"worker_cls": "own.Worker"}, "code by its name"),
        ({"worker_extension_cls": "own.Worker"}, "code by its name"),
        ({"distributed_executor_backend": "own.Executor"}, "code by its name"),
        ({"structured_outputs_config": {"reasoning_parser_plugin": "own.py"}}, "code by its name"),
        ({"kv_transfer_config": {"kv_connector_module_path": "own"}}, "code by its name"),
        ({"logits_processors": ["own:Own"]}, "code by its name"),
        ({"hf_overrides": {"architectures": ["Own"]}}, "another one than was hashed"),
        ({"load_format": "pt"}, "another one than was hashed"),
        ({"tokenizer_mode": "custom"}, "another one than was hashed"),
        ({"model_loader_extra_config": {}}, "another one than was hashed"),
        ({"speculative_config": {"model": "own"}}, "'speculative_config.model' makes of the model"),
        (
            {"additional_config": {"a": [[{"load_format": "pt"}]]}},
            "'additional_config.a.load_format'",
        ),
        ({"seed": 1}, "'seed' is decided by the recipe's own fields"),
        ({"hf_token": "hf_0123456789"}, "Set HF_TOKEN"),
    ],
)
def test_arguments_of_an_engine_load_nothing_foreign(
    tmp_path: Path, arguments: dict[str, Any], why: str
) -> None:
    recipe = write_recipe(tmp_path, tmp_path, tmp_path, generate={"engine_args": arguments})
    with pytest.raises(UsageError, match=why) as refused:
        load_recipe(recipe)
    assert "hf_0123456789" not in str(refused.value)


def test_fresh_weights_name_no_code(tmp_path: Path) -> None:
    student = {"config": {"auto_map": {"AutoModelForCausalLM": "own.Own"}}}
    with pytest.raises(UsageError, match="no student's code is ever run"):
        load_recipe(write_recipe(tmp_path, tmp_path, tmp_path, student=student))
