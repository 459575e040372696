"""Engines: greedy text equals transformers' own, and a row's text is its own.

Sampling is from the right distribution.
"""

import json
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from read_texts import log_softmax
from tiny_jobs import generation_job

from stillroom.stages.engines.base import Completion, Request
from stillroom.stages.engines.opening import choose_engine, open_engine
from stillroom.stages.engines.vllm import VllmEngine
from stillroom.stages.generate import stage as generate
from stillroom.stages.models.causal_lm import load_causal_lm
from stillroom.stages.models.identity import FileHashes, Identity, identify
from stillroom.stages.recipe.engines import Generate
from stillroom.stages.workers.clock import Clock
from stillroom.stages.workers.job import StopFlag
from stillroom.storage.errors import Stopped, UsageError
from stillroom.storage.store.store import Store

ENGINES = ["hf", pytest.param("vllm", marks=[pytest.mark.vllm, pytest.mark.slow])]
STORIES = "models/stories260k-llama-hd32"


# Opening vLLM takes most of a test's time: the engine of the stories stays open for the next test.
open_vllm: dict[Path, VllmEngine] = {}


def author_at(folder: Path, store: Path, **about: Any) -> Identity:
    return identify(folder, dtype="auto", hashes=FileHashes(store, remember=False), **about)


def written(
    name: str, author: Identity, requests: list[Request], **settings: object
) -> dict[int, Completion]:
    wanted = Generate.model_validate({"engine": name} | settings)
    engine = open_engine(name, author, wanted) if name == "hf" else vllm_of(author, wanted)
    return {c.number: c for c in engine.generate(requests, lambda: None)}


def vllm_of(author: Identity, wanted: Generate) -> VllmEngine:
    """The engine that is open, told of other settings, if it has this folder.

    Else a new one in its place.
    """
    if author.folder not in open_vllm or author.folder.name != Path(STORIES).name:
        close_vllm()
        open_vllm[author.folder] = VllmEngine(author, wanted, Clock())
    engine = open_vllm[author.folder]
    engine._settings = wanted
    return engine


def close_vllm() -> None:
    if open_vllm:
        from vllm.distributed import cleanup_dist_env_and_memory

        open_vllm.clear()
        cleanup_dist_env_and_memory()


@pytest.fixture(scope="module", autouse=True)
def no_engine_stays_open() -> Iterator[None]:
    yield
    close_vllm()


@pytest.fixture(autouse=True)
def engine_is_there(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("vllm") and find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")


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
        alone = model.generate(
            torch.tensor([request.prompt_ids]), do_sample=False, max_new_tokens=24
        )
        expected = alone[0, len(request.prompt_ids) :].tolist()
        assert found[request.number].token_ids == expected
        assert found[request.number].finish_reason == ("length" if len(expected) == 24 else "stop")


@pytest.mark.assets
@pytest.mark.parametrize("name", ENGINES)
def test_a_rows_text_does_not_depend_on_the_rows_beside_it(
    name: str, assets: Path, tmp_path: Path
) -> None:
    author = author_at(assets / STORIES, tmp_path)
    requests = [Request(n, [1, 403, 407][: 1 + n % 3], seed=1000 + n) for n in range(12)]
    settings = {"temperature": 1.0, "top_p": 0.95, "max_tokens": 12}
    together = written(name, author, requests, **settings)
    turned = written(name, author, requests[::-1][:7], **settings)
    for number, completion in turned.items():
        assert completion.token_ids == together[number].token_ids
    assert (
        len({tuple(c.token_ids) for c in together.values()}) > 6
    )  # and rows differ from one another


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


@pytest.mark.assets
@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("sampling", [{"temperature": 0.8, "top_p": 0.9}, {"temperature": 0.0}])
def test_what_tokens_were_drawn_from_is_kept_raw(
    name: str, sampling: dict[str, float], assets: Path, tmp_path: Path
) -> None:
    """Neither temperature nor top_p is in it, nothing outside a nucleus is -inf.

    What a stop string cuts is cut.
    """
    author = author_at(assets / STORIES, tmp_path)
    model = load_causal_lm(author)
    requests = [Request(n, [1, 403, 407, 261][: 2 + n % 3], seed=n) for n in range(6)]
    settings = {"max_tokens": 20, "keep": {"k": 20}, "stop": ["the"], **sampling}
    for number, completion in written(name, author, requests, **settings).items():
        assert completion.targets is not None
        prompt, found = requests[number].prompt_ids, completion.targets.targets
        said = log_softmax(model, prompt + completion.token_ids)[len(prompt) - 1 : -1]
        assert found.ids is not None
        at = np.take_along_axis(said, found.ids.astype(np.int64), axis=1)
        np.testing.assert_allclose(found.logprobs, at, atol=1e-3)
        assert (at[:, -1] >= -np.sort(-said, axis=1)[:, 19] - 1e-3).all()
        own = said[np.arange(len(said)), completion.token_ids]
        np.testing.assert_allclose(found.token_logprob, own, atol=1e-3)
        outside = said.copy()
        np.put_along_axis(outside, found.ids.astype(np.int64), -np.inf, axis=1)
        bound = completion.targets.tail_bound
        off = np.abs(found.tail_logprob - np.log(np.exp(outside).sum(axis=1)))
        assert (off <= 1e-3 + (0.0 if bound is None else bound)).all()
        entropy = -(np.exp(said) * said).sum(axis=1)
        assert (found.entropy <= entropy + 1e-3).all()


GOES_ON = ", there was a little girl named Lily."  # after "Once upon a time", greedily


@pytest.mark.assets
@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("ttle g", ", there was a"),  # begins inside the token " little"
        ("girl named L", ", there was a little"),  # " g", "ir", "l", " named", " Lily"
        (",", ""),  # at once
    ],
)
def test_ids_end_where_the_text_ends(
    name: str, assets: Path, tmp_path: Path, stop: str, text: str
) -> None:
    from transformers import AutoTokenizer

    author = author_at(assets / STORIES, tmp_path)
    requests = [Request(0, [1, 403, 407, 261, 378], seed=0)]
    settings = {"temperature": 0.0, "max_tokens": 24}
    free = written(name, author, requests, **settings)[0]
    assert free.text.lstrip().startswith(GOES_ON)
    cut = written(name, author, requests, **settings, stop=[stop])[0]
    assert (cut.text, cut.finish_reason) == (text, "stop")
    assert cut.token_ids == free.token_ids[: len(cut.token_ids)]
    assert AutoTokenizer.from_pretrained(assets / STORIES).decode(cut.token_ids) == text


def test_noise_per_row_draws_from_the_models_distribution(
    tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    """1,500 first tokens are held against the probabilities.

    Every token is within 4.5 standard deviations.
    """
    from transformers import AutoModelForCausalLM

    folder = tiny_llama(initializer_range=1.0)
    prompt, draws = [1, 4, 6], 1500
    logits = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([prompt])).logits[0, -1]
    expected = (logits / 1.5).softmax(-1).tolist()
    requests = [Request(n, prompt, seed=n) for n in range(draws)]
    found = written(
        "hf",
        author_at(folder, tmp_path),
        requests,
        temperature=1.5,
        max_tokens=1,
        engine_args={"batch_size": 500},
    )
    counts = Counter(c.token_ids[0] for c in found.values())
    for token, p in enumerate(expected):
        assert abs(counts[token] - draws * p) < 4.5 * (draws * p * (1 - p)) ** 0.5 + 1


def test_vllm_by_name_where_it_is_not_installed_says_what_to_do(
    tiny_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    author = author_at(tiny_llama(), tmp_path)
    monkeypatch.setattr("stillroom.stages.engines.opening.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"Install stillroom\[vllm\]"):
        choose_engine("vllm", author)
    assert choose_engine(None, author) == "hf"


def test_a_row_that_the_context_cuts_does_not_shorten_its_neighbours(
    tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    author = author_at(tiny_llama(eos_token_id=31, max_position_embeddings=24), tmp_path)
    requests = [Request(0, [1, 4, 5], seed=0), Request(1, [1, *range(4, 22)], seed=1)]
    found = written("hf", author, requests, temperature=0.0, max_tokens=16)
    assert len(found[0].token_ids) == 16 or found[0].finish_reason == "stop"
    assert len(found[1].token_ids) == 24 - 19 or found[1].finish_reason == "stop"


def test_rows_that_would_change_one_another_are_written_alone(tmp_path: Path) -> None:
    """Phi-3's frequencies are others beyond 16 tokens of the longest row of a pass."""
    from tiny_llama import tiny_tokenizer
    from transformers import Phi3Config, Phi3ForCausalLM

    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4}
    rope |= {"long_factor": [1.0, 4.0, 16.0, 32.0]}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.5}
    torch.manual_seed(0)
    Phi3ForCausalLM(
        Phi3Config(
            **sizes,
            **heads,
            rope_parameters=rope,
            original_max_position_embeddings=16,
            pad_token_id=0,
            eos_token_id=31,
        )
    ).save_pretrained(tmp_path / "phi3")
    tiny_tokenizer().save_pretrained(tmp_path / "phi3")
    author = author_at(tmp_path / "phi3", tmp_path)
    prompts = [[1, *range(4, 11)], [1, *range(20, 3, -1)], [1, *range(3, 30)]]
    requests = [Request(n, prompt, seed=n) for n, prompt in enumerate(prompts)]
    settings = {"temperature": 0.0, "max_tokens": 6}
    together = written("hf", author, requests, **settings)
    for request in requests:
        (alone,) = written("hf", author, [request], **settings).values()
        assert together[request.number].token_ids == alone.token_ids


def test_an_author_that_sees_the_future_is_refused(
    tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    author = author_at(tiny_llama(is_causal=False), tmp_path)
    with pytest.raises(UsageError, match="sees the future"):
        written("hf", author, [])


CAT_THE, DOG, CAT, THE = (
    "cat the",
    "dog",
    6,
    4,
)  # stop strings in the tiny tokenizer's words, and ids of the first


def test_rows_end_where_their_own_completion_does(
    tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    """End id 0, prompts that end in the beginning of a stop string.

    The rows of an endless model say where ends are.
    """
    sampled = {"temperature": 1.0, "max_tokens": 16, "engine_args": {"batch_size": 64}}
    requests = [Request(n, [1, *[5] * (n % 3), CAT], seed=n) for n in range(64)]
    endless = author_at(tiny_llama("endless", eos_token_id=None), tmp_path)
    free = written("hf", endless, requests, **sampled)
    author = author_at(tiny_llama("ends", eos_token_id=0), tmp_path)
    found = written("hf", author, requests, **sampled, stop=[CAT_THE, DOG])
    tokenizer = open_engine("hf", author, Generate(engine="hf"))._tokenizer
    how: Counter[str] = Counter()
    for number, completion in found.items():
        ids, kind = free[number].token_ids, "length"
        assert len(ids) == 16
        for end in range(1, 17):
            text = tokenizer.decode(ids[:end], skip_special_tokens=True)
            if ids[end - 1] == 0 or CAT_THE in text or DOG in text:
                ids, kind = ids[:end], "end id" if ids[end - 1] == 0 else "stop string"
                break
        text = tokenizer.decode(ids, skip_special_tokens=True)
        before = text.split(CAT_THE)[0].split(DOG)[0]
        if before != text:
            whole = [tokenizer.decode(ids[:n], skip_special_tokens=True) for n in range(len(ids))]
            ids = ids[: max(n for n, said in enumerate(whole) if said == before.strip())]
        assert completion.token_ids == ids
        assert completion.finish_reason == ("length" if kind == "length" else "stop")
        assert completion.text == tokenizer.decode(ids, skip_special_tokens=True)
        how[kind] += 1
    assert len({len(c.token_ids) for c in found.values()}) > 8
    assert min(how[kind] for kind in ("length", "end id", "stop string")) > 3
    ids = [c.token_ids for c in found.values() if c.token_ids]
    assert any(i[0] == THE and len(i) > 1 for i in ids)  # "cat | the" does not end it


@pytest.mark.assets
@pytest.mark.parametrize("name", ENGINES)
def test_a_stop_string_is_not_found_across_the_end_of_the_prompt(
    name: str, assets: Path, tmp_path: Path
) -> None:
    author = author_at(assets / STORIES, tmp_path)
    requests = [
        Request(0, [1, 403, 407, 261, 378], seed=0)
    ]  # "Once upon a time", which goes on with ", there"
    free = written(name, author, requests, temperature=0.0, max_tokens=12)
    assert free[0].text.lstrip().startswith(",")
    assert written(name, author, requests, temperature=0.0, max_tokens=12, stop=["time, "]) == free


@pytest.mark.assets
@pytest.mark.parametrize("name", ENGINES)
def test_of_a_models_generation_config_only_the_end_ids_count(
    name: str, assets: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(assets / STORIES, folder)
    path = folder / "generation_config.json"
    requests = [Request(n, [1, 403, 407][: 1 + n], seed=n) for n in range(3)]
    settings = {"temperature": 1.0, "max_tokens": 24}
    plain = written(name, author_at(folder, tmp_path), requests, **settings)
    path.write_text(
        json.dumps(
            json.loads(path.read_text())
            | {
                "do_sample": True,
                "repetition_penalty": 5.0,
                "no_repeat_ngram_size": 1,
                "top_k": 1,
                "temperature": 0.1,
            }
        )
    )
    assert written(name, author_at(folder, tmp_path), requests, **settings) == plain
    end = plain[0].token_ids[4]
    path.write_text(json.dumps({"eos_token_id": [2, end]}))
    cut = written(name, author_at(folder, tmp_path), requests, **settings)[0]
    assert cut.token_ids == plain[0].token_ids[: plain[0].token_ids.index(end) + 1]
    assert cut.finish_reason == "stop"


@pytest.mark.assets
@pytest.mark.parametrize("name", ENGINES)
def test_an_adapter_of_a_large_rank_writes(name: str, assets: Path, tmp_path: Path) -> None:
    """Told of no rank, vLLM makes room for 16, and refuses this one."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(assets / STORIES)
    lora = LoraConfig(
        r=24, lora_alpha=48, target_modules=["q_proj", "v_proj"], init_lora_weights=False
    )
    model = get_peft_model(base, lora).eval()
    model.save_pretrained(tmp_path / "adapter")
    author = author_at(assets / STORIES, tmp_path, adapter=tmp_path / "adapter")
    prompt = [1, 403, 407, 261, 378]
    alone = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12)[0]
    requests = [Request(0, prompt, seed=0)]
    (found,) = written(name, author, requests, temperature=0.0, max_tokens=12).values()
    assert found.token_ids == alone[len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 4}, "no argument 'batch'; it has batch_size and max_model_len"),
        ({"batch_size": 0}, r"batch_size must be a whole number of at least 1 \(got 0\)"),
        ({"batch_size": "8"}, r"got '8'"),
        ({"batch_size": True}, r"got True"),
    ],
)
def test_arguments_that_hf_does_not_know_are_refused(
    tiny_llama: Callable[..., Path], tmp_path: Path, arguments: dict[str, object], message: str
) -> None:
    """Where the recipe names it, as the recipe is read; else as it opens."""
    with pytest.raises(ValueError, match=message):
        Generate(engine="hf", engine_args=arguments)
    author = author_at(tiny_llama(), tmp_path)
    with pytest.raises(UsageError, match=message):
        open_engine("hf", author, Generate(engine_args=arguments))


def idle_vllm(steps: list[list[object]]) -> tuple[VllmEngine, list[str]]:
    """A VllmEngine on an engine that takes nothing, or works for some steps.

    What was called on it comes with it.
    """
    calls: list[str] = []

    def step() -> list[object]:
        assert steps, "a step with nothing to do waits forever"
        calls.append("step")
        return steps.pop(0)

    engine = VllmEngine.__new__(VllmEngine)
    engine._clock = Clock()
    engine._llm = SimpleNamespace(
        llm_engine=SimpleNamespace(
            has_unfinished_requests=lambda: bool(steps),
            get_num_unfinished_requests=lambda: len(steps),
            step=step,
            vllm_config=SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=4)),
        )
    )
    return engine, calls


def test_vllm_is_not_asked_for_a_step_when_it_refused_everything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(VllmEngine, "_submit", lambda self, request: "too long")
    engine, calls = idle_vllm([])
    found = list(engine.generate([Request(n, [1], seed=n) for n in range(3)], lambda: None))
    assert [c.error for c in found] == ["too long"] * 3
    assert calls == []


def test_vllm_beats_at_every_step() -> None:
    engine, calls = idle_vllm([[], [SimpleNamespace(finished=False)], []])
    assert list(engine.generate([], lambda: calls.append("beat"))) == []
    assert calls == ["beat", "step"] * 3


@pytest.mark.parametrize(("context", "given"), [(128, {"max_model_len": 128}), (2**31 - 1, {})])
def test_vllm_is_told_a_context_that_is_known(
    tiny_llama: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    context: int,
    given: dict,
) -> None:
    told: dict[str, object] = {}
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=told.update))
    monkeypatch.setattr("stillroom.stages.engines.vllm._prepare_cpu", lambda: None)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "1")
    author = replace(author_at(tiny_llama(), tmp_path), context_tokens=context)
    VllmEngine(author, Generate(engine="vllm"), Clock())
    assert {k: v for k, v in told.items() if k == "max_model_len"} == given


class SlowStop(StopFlag):
    """Looks take a while; remembers what was committed at each; raises at look number `last`."""

    def __init__(self, store: Path, last: int) -> None:
        super().__init__()
        self.committed: list[int] = []
        self._store, self._last = store, last

    def check(self) -> None:
        time.sleep(0.02)
        self.committed.append(Store.open(self._store).index("generations", ["key"]).num_rows)
        if len(self.committed) >= self._last:
            self.number = signal.SIGTERM
        super().check()


def test_a_signal_does_not_wait_for_a_busy_engine(
    tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    job, author = generation_job(tiny_llama, tmp_path)
    stop = SlowStop(tmp_path / "store", last=17)  # one look before the first step, ten in a batch
    with pytest.raises(Stopped):
        generate.run(replace(job, stop=stop), author)
    assert len(stop.committed) == 17
    assert stop.committed[-1] == 0
    assert Store.open(tmp_path / "store").index("generations", ["key"]).num_rows == 4


def test_rows_are_committed_in_time_while_the_engine_is_busy(
    tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    job, author = generation_job(tiny_llama, tmp_path, storage={"commit_seconds": 0.1})
    stop = SlowStop(tmp_path / "store", last=1000)
    result = generate.run(replace(job, stop=stop), author)
    assert result.rows == 12
    assert len(stop.committed) == 1 + 3 * 10
    assert (
        stop.committed[20] == 4
    )  # the end of the second batch: the first was committed on the way
