"""Engines: greedy text equals transformers' own, a row's text is its own, sampling is from the right distribution."""

from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from stillroom.stages.engine import Completion, Request, choose_engine, open_engine
from stillroom.stages.identity import FileHashes, Identity, identify
from stillroom.stages.sections import Generate
from stillroom.storage.errors import UsageError

ENGINES = ["hf", pytest.param("vllm", marks=[pytest.mark.vllm, pytest.mark.slow])]
STORIES = "models/stories260k-llama-hd32"


def author_at(folder: Path, store: Path) -> Identity:
    return identify(folder, dtype="auto", hashes=FileHashes(store, remember=False))


def written(name: str, author: Identity, requests: list[Request], **settings: object) -> dict[int, Completion]:
    engine = open_engine(name, author, Generate.model_validate({"engine": name} | settings))
    return {c.number: c for c in engine.generate(requests)}


@pytest.fixture(autouse=True)
def engine_is_there(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker("vllm") and find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    yield
    if request.node.get_closest_marker("vllm"):
        from vllm.distributed import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()


@pytest.mark.assets
@pytest.mark.parametrize("name", ENGINES)
def test_greedy_text_is_what_transformers_writes(name: str, assets: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = assets / STORIES
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    texts = ["Once upon a time", "The dog", "Lily wanted to play with her friend Tim in the"]
    requests = [Request(n, tokenizer(t)["input_ids"], seed=n) for n, t in enumerate(texts)]
    found = written(name, author_at(folder, tmp_path), requests, temperature=0.0, max_tokens=24)
    for request in requests:
        alone = model.generate(torch.tensor([request.prompt_ids]), do_sample=False, max_new_tokens=24)
        expected = alone[0, len(request.prompt_ids) :].tolist()
        assert found[request.number].token_ids == expected
        assert found[request.number].finish_reason == ("length" if len(expected) == 24 else "stop")


@pytest.mark.assets
@pytest.mark.parametrize("name", ENGINES)
def test_a_rows_text_does_not_depend_on_the_rows_beside_it(name: str, assets: Path, tmp_path: Path) -> None:
    author = author_at(assets / STORIES, tmp_path)
    requests = [Request(n, [1, 403, 407][: 1 + n % 3], seed=1000 + n) for n in range(12)]
    settings = {"temperature": 1.0, "top_p": 0.95, "max_tokens": 12}
    together = written(name, author, requests, **settings)
    turned = written(name, author, requests[::-1][:7], **settings)
    for number, completion in turned.items():
        assert completion.token_ids == together[number].token_ids
    assert len({tuple(c.token_ids) for c in together.values()}) > 6  # and rows differ from one another


@pytest.mark.assets
@pytest.mark.parametrize("name", ENGINES)
def test_a_stop_string_ends_the_text_before_it(name: str, assets: Path, tmp_path: Path) -> None:
    author = author_at(assets / STORIES, tmp_path)
    requests = [Request(0, [1, 403, 407, 261], seed=0)]
    free = written(name, author, requests, temperature=0.0, max_tokens=40)[0]
    word = free.text.split()[3]
    cut = written(name, author, requests, temperature=0.0, max_tokens=40, stop=[word])[0]
    assert cut.finish_reason == "stop"
    assert word not in cut.text
    assert free.text.startswith(cut.text)
    assert free.token_ids[: len(cut.token_ids)] == cut.token_ids


def test_noise_per_row_draws_from_the_models_distribution(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    """1,500 first tokens against the probabilities, within 4.5 standard deviations for every token."""
    from transformers import AutoModelForCausalLM

    folder = tiny_llama(initializer_range=1.0)
    prompt, draws = [1, 4, 6], 1500
    logits = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([prompt])).logits[0, -1]
    expected = (logits / 1.5).softmax(-1).tolist()
    requests = [Request(n, prompt, seed=n) for n in range(draws)]
    found = written(
        "hf", author_at(folder, tmp_path), requests, temperature=1.5, max_tokens=1, engine_args={"batch_size": 500}
    )
    counts = Counter(c.token_ids[0] for c in found.values())
    for token, p in enumerate(expected):
        assert abs(counts[token] - draws * p) < 4.5 * (draws * p * (1 - p)) ** 0.5 + 1


def test_vllm_by_name_where_it_is_not_installed_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stillroom.stages.engine.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"Install stillroom\[vllm\]"):
        choose_engine("vllm")
    assert choose_engine(None) == "hf"


def test_a_row_that_the_context_cuts_does_not_shorten_its_neighbours(
    tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    author = author_at(tiny_llama(eos_token_id=31, max_position_embeddings=24), tmp_path)
    requests = [Request(0, [1, 4, 5], seed=0), Request(1, [1, *range(4, 22)], seed=1)]
    found = written("hf", author, requests, temperature=0.0, max_tokens=16)
    assert len(found[0].token_ids) == 16 or found[0].finish_reason == "stop"
    assert len(found[1].token_ids) == 24 - 19 or found[1].finish_reason == "stop"
