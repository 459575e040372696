"""A real endpoint, `vllm serve` on 127.0.0.1, writes what the offline engine writes.

It gives its log-probabilities too.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kit import stillroom, told, write_jsonl, write_recipe
from read_texts import teacher_at
from running import until

from stillroom.stages.engines.base import Request
from stillroom.stages.engines.vllm import VllmEngine
from stillroom.stages.models.inputs.rendering import Renderer
from stillroom.stages.models.inputs.token_names import TokenNames
from stillroom.stages.recipe.engines import Generate
from stillroom.stages.workers.clock import Clock
from stillroom.storage.keys import row_seed
from stillroom.storage.store.sql import query
from stillroom.storage.store.store import Store
from stillroom.storage.tables.schema import SCHEMAS
from stillroom.storage.tables.soft_targets import SoftTargets

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.assets]
PROMPTS = ["Once upon a time", "The dog", "Lily wanted to play with her friend", "One day, Tim"]
ENVIRONMENT = {
    "TORCH_COMPILE_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ 'u:' if m.role == 'user' else 'a:' }}{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
K = 16


@pytest.fixture(scope="module")
def served(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with the stories model, under the name `stories`."""
    if find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tmp_path = tmp_path_factory.mktemp("served")
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    words = ["--chat-template", str(tmp_path / "template.jinja"), "--max-logprobs", "64"]
    words += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    words += ["--max-model-len", "512", "--served-model-name", "stories"]
    program = Path(sys.executable).parent / "vllm"
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(
            [program, "serve", assets / "models/stories260k-llama-hd32", *words],
            env=os.environ | ENVIRONMENT,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            address = f"http://127.0.0.1:{port}"
            # On busy cores it takes minutes.
            until(lambda: ended(server) or is_healthy(address), "vllm serve", patience=420.0)
            assert not ended(server), (tmp_path / "server.log").read_text()[-2000:]
            yield f"{address}/v1"
        finally:
            os.killpg(server.pid, signal.SIGKILL)  # it has processes of its own
            server.wait()


def ended(server: subprocess.Popen[bytes]) -> bool:
    return server.poll() is not None


def is_healthy(address: str) -> bool:
    with suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=1) as answer:
        return bool(answer.status == 200)
    return False


def test_greedy_rows_are_those_of_the_offline_engine(
    served: str, assets: Path, tmp_path: Path
) -> None:
    source = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": text} for text in PROMPTS])
    alone = dict.fromkeys(("student", "score", "loss", "train", "evaluate"))
    sampling = {"temperature": 0.0, "max_tokens": 24}
    offline = {"engine": "vllm", "engine_args": {"max_model_len": 512}} | sampling
    asked = {"engine": "openai", "base_url": served, "model": "stories"} | sampling
    found = []
    for name, generate in (("asked", asked), ("offline", offline)):
        (tmp_path / name).mkdir()
        model = assets / "models/stories260k-llama-hd32"
        data = {"source": str(source), "format": "prompt", "holdout": 1}
        recipe = write_recipe(tmp_path / name, model, source, generate=generate, data=data, **alone)
        stillroom("run", recipe)
        columns = "prompt_key, text, finish_reason, prompt_tokens, token_ids"
        store = Store.open(tmp_path / name / "store")
        rows = query(store, f"SELECT {columns} FROM generations ORDER BY prompt_key").to_pylist()
        found.append(rows)
    assert found[0] == found[1]
    assert len(found[0]) == len(PROMPTS)


@pytest.mark.parametrize("kind", ["prompt", "messages"])
def test_log_probabilities_are_those_of_the_offline_engine(
    served: str, assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Targets by the ids that the server gives equal those by the names of tokens.

    They are the same where the names are of one id.
    """
    model = tmp_path / "model"
    shutil.copytree(assets / "models/stories260k-llama-hd32", model)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    asked = [
        {"prompt": text} if kind == "prompt" else {"messages": [{"role": "user", "content": text}]}
        for text in PROMPTS
    ]
    source = write_jsonl(tmp_path / "prompts.jsonl", asked)
    alone = dict.fromkeys(("student", "loss", "train", "evaluate"))
    generate = {"engine": "openai", "base_url": served, "model": "stories", "max_tokens": 24}
    generate |= {"keep": {"k": K}, "samples": 3}
    data = {"source": str(source), "format": kind, "holdout": 1}
    found = []
    for name in ("ids", "names"):
        if name == "names":
            monkeypatch.setattr("stillroom.stages.engines.openai._BY_IDS", {})
        folder = tmp_path / name
        folder.mkdir()
        recipe = write_recipe(
            folder, model, source, generate=generate, data=data, score={"k": K}, **alone
        )
        stillroom("run", recipe, "--set", "storage.mantissa_bits=23")
        assert told("verify", folder / "store")["ok"]
        stored = Store.open(folder / "store").index("soft_targets", SCHEMAS["soft_targets"].names)
        found.append({bytes(row["tokens_key"]): row for row in stored.to_pylist()})
    by_ids, by_names = found
    assert len(by_ids) == 3 * len(PROMPTS)
    # A text that is not tokenized so has no ids by names.
    assert len(by_names) >= len(by_ids) // 2
    assert by_names.keys() <= by_ids.keys()
    entries, names = 0, TokenNames(Renderer(model, {}).tokenizer)
    for key, row in by_names.items():
        ours, theirs = targets_of(row), targets_of(by_ids[key])
        assert row["token_ids"] == by_ids[key]["token_ids"]
        for n in range(len(ours.ids)):
            whole = dict(zip(theirs.ids[n].tolist(), theirs.logprobs[n].tolist(), strict=True))
            some = dict(zip(ours.ids[n].tolist(), ours.logprobs[n].tolist(), strict=True))
            some.pop(-1, None)
            entries += len(some)
            assert all(abs(whole[i] - value) <= 1e-6 for i, value in some.items() if i in whole)
            # A server lists the token that is there too.
            assert len(some.keys() - whole.keys()) <= 1
            assert all(is_ambiguous(names, i) for i in whole.keys() - some.keys())
    assert entries > 1000
    compare_offline(model, tmp_path / "ids", by_ids, chat=kind == "messages")


def is_ambiguous(names: TokenNames, token: int) -> bool:
    """Whether another id may be called so.

    vLLM decodes each alone, without the space that it begins with.
    """
    called = names.alone(token)
    others = [i for i in range(512) if called in (names.alone(i), names.exact(i))]
    return not called.isascii() or not called or len(others) > 1


def compare_offline(
    model: Path, folder: Path, by_ids: dict[bytes, dict[str, Any]], *, chat: bool
) -> None:
    """Each row is held against what the engine keeps in this process.

    The engine draws with the seeds that the server was given.
    """
    (file,) = (folder / "run/answers").rglob("*.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    heard = [line for line in lines if "answered" in line]
    settings = {"engine": "vllm", "max_tokens": 24, "keep": {"k": K}}
    settings |= {"engine_args": {"max_model_len": 512}}
    author = teacher_at(model, folder)
    engine = VllmEngine(author, Generate.model_validate(settings), Clock())
    requests = [
        Request(n, one["logprobs"]["prompt_ids"], row_seed(bytes.fromhex(one["answered"])) % 2**31)
        for n, one in enumerate(heard)
    ]
    rows = {tuple(row["token_ids"]): row for row in by_ids.values()}
    compared, worst, others = 0, 0.0, 0
    for completion in engine.generate(iter(requests), lambda: None):
        said = heard[completion.number]["logprobs"]
        if completion.token_ids != said["ids"]:  # two candidates within a rounding error
            others += 1
            continue
        assert completion.targets is not None
        row = rows[(*said["prompt_ids"], *said["ids"])]
        theirs, ours = completion.targets.targets, targets_of(row)
        worst = max(worst, float(np.abs(theirs.token_logprob - ours.token_logprob).max()))
        for n in range(len(ours.ids)):
            a = dict(zip(theirs.ids[n].tolist(), theirs.logprobs[n].tolist(), strict=True))
            b = dict(zip(ours.ids[n].tolist(), ours.logprobs[n].tolist(), strict=True))
            # In a conversation the server lists the token that is there in place of the least.
            assert len(a.keys() - b.keys()) <= chat
            worst = max([worst, *(abs(a[i] - b[i]) for i in a.keys() & b.keys())])
            compared += len(a.keys() & b.keys())
    assert others <= 1
    assert compared > 0.7 * K * sum(row["span_tokens"] for row in by_ids.values())
    assert worst <= 1e-3, f"of {len(rows)} rows, {compared} entries"


def targets_of(row: dict[str, Any]) -> Any:
    return SoftTargets.from_row(
        {name: np.array(v) if isinstance(v, list) else v for name, v in row.items()}
    )
