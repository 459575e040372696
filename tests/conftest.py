"""Fixtures of the whole suite.

There is no network, there are as many threads as asked for, tiny models, and the shared asset
folder.
"""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_llama import save_tiny_llama

# Before any test module imports transformers or datasets: they read these once.
KEPT = (
    "STILLROOM_ASSETS",
    "STILLROOM_DATASETS_441",
    "STILLROOM_TEST_THREADS",
    "STILLROOM_TRANSFORMERS_457",
)
for name in [
    n for n in os.environ if n.startswith(("HF_", "TRANSFORMERS_", "STILLROOM_")) and n not in KEPT
]:
    del os.environ[name]
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Every process that a test starts gets it too: threads that share a core wait for one another
    # by spinning.
    "OMP_NUM_THREADS": os.environ.get("STILLROOM_TEST_THREADS", "1"),
}

# Under nohup it is ignored, also by the processes that tests start: as Stillroom promises.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def clean_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Keep tests from the user's Hub cache and token.

    None reaches the network through Hugging Face libraries either.
    """
    for name in [n for n in os.environ if n.startswith(("HF_", "TRANSFORMERS_"))]:
        monkeypatch.delenv(name)
    home = tmp_path_factory.getbasetemp() / "hf-home"
    # What tests check is not remembered among the user's own shards.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "user-cache"))
    for name, value in {
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(autouse=True, scope="session")
def threads() -> None:
    """Use one thread, for the sake of the other tests on the machine.

    `make processors` asks for two as well.
    """
    import torch

    torch.set_num_threads(int(os.environ.get("STILLROOM_TEST_THREADS", "1")))


@pytest.fixture(scope="session")
def assets() -> Path:
    """The shared asset folder: small real models and texts."""
    beside = Path(__file__).parents[2] / "shared" / "assets"
    folder = Path(os.environ.get("STILLROOM_ASSETS", beside))
    if not folder.is_dir():
        pytest.skip(
            f"no assets at {folder}: set STILLROOM_ASSETS to the folder that holds models/ and "
            "text/"
        )
    return folder


@pytest.fixture
def tiny_llama(tmp_path: Path) -> Callable[..., Path]:
    """Factory of small random Llamas, saved with their tokenizers.

    It is called as `tiny_llama("name", seed=0, vocab_size=32, ...)`.

    The tokenizer is word-level: ids 0-3 are <unk> <s> </s> <pad>, the words of `WORDS` follow.
    """

    def make(name: str = "tiny", **options: Any) -> Path:
        return save_tiny_llama(tmp_path / name, **options)

    return make


@pytest.fixture(autouse=True)
def nothing_hidden() -> Iterator[None]:
    """What a recipe of one test hides is shown again in the next."""
    from stillroom.storage.credentials import show_again

    yield
    show_again()
