"""Whatever a library raises while a model is loaded is answered: which model, why, what to do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from stillroom.stages.models.causal_lm import KIND, load_causal_lm
from stillroom.stages.models.identity import FileHashes, identify
from stillroom.stages.models.inputs.rendering import Renderer
from stillroom.stages.recipe.engines import LORA_RANKS, lora_room
from stillroom.storage.errors import UsageError

AUTO = transformers.AutoModelForCausalLM
LOADERS = {
    "teacher": (AUTO, lambda identity: KIND.teacher(identity, device_map=None)),
    "student": (AUTO, lambda identity: KIND.student(identity.folder)),
    "adapter": (peft.PeftModel, load_causal_lm),
    "tokenizer": (transformers.AutoTokenizer, lambda identity: Renderer(identity.folder, {})),
}


@pytest.fixture
def load(
    tiny_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, BaseException], Any]:
    """Load something of a model while the library raises."""
    hashes = FileHashes(tmp_path / "store", remember=False)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").touch()
    (adapter / "adapter_config.json").write_text('{"r": 8}')
    identity = identify(tiny_llama("good"), dtype="auto", hashes=hashes, adapter=adapter)

    def load_with(what: str, error: BaseException) -> Any:
        def fail(*_: Any, **__: Any) -> None:
            raise error

        library, loader = LOADERS[what]
        monkeypatch.setattr(library, "from_pretrained", fail)
        return loader(identity)

    return load_with


@pytest.mark.parametrize("what", LOADERS)
@pytest.mark.parametrize(
    "error", [AttributeError("no\nlayer"), TypeError("two"), ImportError("package"), IndexError()]
)
def test_any_error_of_a_library_is_answered(
    load: Callable[[str, BaseException], Any], what: str, error: Exception
) -> None:
    with pytest.raises(UsageError) as answer:
        load(what, error)
    (line,) = str(answer.value).splitlines()
    assert all(part in line for part in ("good", type(error).__name__, *str(error).split()))


@pytest.mark.parametrize("what", LOADERS)
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, KeyboardInterrupt])
def test_what_is_no_fault_of_the_model_goes_on(
    load: Callable[[str, BaseException], Any], what: str, error: type[BaseException]
) -> None:
    with pytest.raises(error):
        load(what, error())


class Planted:
    """A pickle that makes a file where it is read."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return open, (str(self._path), "w")


@pytest.mark.parametrize("what", ["teacher", "student", "adapter"])
def test_code_in_pickled_weights_is_not_run(
    tiny_llama: Callable[..., Path], tmp_path: Path, what: str
) -> None:
    folder, adapter = tiny_llama(), None
    if what == "adapter":
        adapter = tmp_path / "adapter"
        peft.LoraConfig(r=2, target_modules=["q_proj"]).save_pretrained(adapter)
        planted = adapter / "adapter_model.bin"
    else:
        (folder / "model.safetensors").unlink()
        planted = folder / "pytorch_model.bin"
    torch.save({"model.norm.weight": Planted(tmp_path / "ran")}, planted)
    hashes = FileHashes(tmp_path / "store", remember=False)
    identity = identify(folder, dtype="auto", hashes=hashes, adapter=adapter)
    with pytest.raises(UsageError):
        LOADERS[what][1](identity)
    assert not (tmp_path / "ran").exists()


def test_a_teacher_without_its_output_layer_is_refused(
    tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_llama()
    model = AUTO.from_pretrained(folder)
    state = {name: t for name, t in model.state_dict().items() if name != "lm_head.weight"}
    model.save_pretrained(folder, state_dict=state)
    identity = identify(folder, dtype="auto", hashes=FileHashes(tmp_path / "s", remember=False))
    with pytest.raises(UsageError, match=r"lacks weights of .* \(lm_head\.weight\)"):
        load_causal_lm(identity)


@pytest.mark.parametrize(
    ("adapter", "room"),
    [
        ({"r": 4}, 8),
        ({"r": 16}, 16),
        ({"r": 17}, 32),
        ({"r": 257}, 320),
        ({"r": 8, "rank_pattern": {"q": 200}}, 256),
    ],
)
def test_vllm_makes_room_for_the_largest_rank(adapter: dict[str, Any], room: int) -> None:
    assert lora_room(adapter) == room
    assert room in LORA_RANKS
