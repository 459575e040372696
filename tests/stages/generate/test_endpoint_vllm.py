"""A real endpoint, `vllm serve` on 127.0.0.1: what it writes greedily is what the offline engine writes."""

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
from kit import stillroom, write_jsonl, write_recipe
from running import until

from stillroom.storage.store.sql import query
from stillroom.storage.store.store import Store

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.assets]
PROMPTS = ["Once upon a time", "The dog", "Lily wanted to play with her friend", "One day, Tim"]
ENVIRONMENT = {
    "TORCH_COMPILE_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


@pytest.fixture
def served(assets: Path, tmp_path: Path) -> Iterator[str]:
    """The address of a server with the stories model, under the name `stories`."""
    if find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
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
