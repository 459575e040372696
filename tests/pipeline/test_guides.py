"""Every command of every guide runs, in order, on tiny models.

The models stand under the real names in the Hub's cache.
"""

import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
from endpoint_server import KEY, endpoint
from kit import stillroom

from stillroom.stages.models.inputs.rendering import Renderer
from stillroom.stages.recipe import load
from stillroom.stages.recipe.formats import FORMATS
from stillroom.stages.recipe.sections import Recipe

GUIDES = Path(__file__).parents[2] / "pipeline" / "guides"
RECORDS = 24  # of a data file, made after the three that its guide shows
# The guides are written for real models: a run on tiny ones takes smaller numbers and the engine
# that starts fast.
SMALLER = {
    "data": {"holdout": 4},
    "generate": {
        "engine": "hf",
        "max_tokens": 8,
        "engine_args": {},
    },  # what guides name there is vLLM's
    "train": {"epochs": 1, "tokens_per_step": 512},
    "evaluate": {"tokens": 100},
}


@dataclass(frozen=True)
class Block:
    """A fenced block: a file if it has a title, else commands."""

    language: str
    title: str | None
    text: str


def blocks(guide: Path) -> list[Block]:
    found = re.findall(
        r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', guide.read_text(), re.MULTILINE | re.DOTALL
    )
    return [Block(language, title or None, text) for language, title, text in found]


def names(guide: Path) -> set[str]:
    """Models that a guide names."""
    return set(re.findall(r"\bQwen/[\w.-]+", guide.read_text()))


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer of bytes and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("stand-in")
    vocab = {
        token: i for i, token in enumerate(["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    turns = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    fast.chat_template = turns + "assistant: "
    fast.save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(vocab), eos_token_id=0, **sizes, **heads))
    model.save_pretrained(folder)
    return folder


def put_under(name: str, stand_in: Path, cache: Path) -> None:
    """Let the Hub's cache hold the stand-in under a name, with weights that no other name has."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    repository = cache / "hub" / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(stand_in, snapshot)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(crc32(name.encode()))
        Qwen3ForCausalLM(Qwen3Config.from_pretrained(stand_in)).save_pretrained(snapshot)


def write_file(block: Block, folder: Path, served: str) -> None:
    """Recipes with smaller numbers, data with more records.

    `served`: the endpoint that stands for all.
    """
    import yaml

    assert block.title is not None
    if block.language == "yml":  # of another tool
        (folder / block.title).write_text(block.text)
        return
    if block.language == "yaml":
        tree = yaml.safe_load(block.text)
        for section, fields in SMALLER.items():
            if section in tree:
                tree[section] |= fields
        if "base_url" in tree.get("generate", {}):
            tree["generate"] |= {"engine": "openai", "base_url": served}
        if "config" in tree.get("student", {}):
            tree["student"]["config"] = {
                "num_hidden_layers": 1,
                "hidden_size": 8,
                "intermediate_size": 16,
            }
        (folder / block.title).write_text(yaml.safe_dump(tree))
        return
    shown = [json.loads(line) for line in block.text.splitlines()]
    records = [numbered(shown[i % len(shown)], i) for i in range(RECORDS)]
    (folder / block.title).write_text("".join(json.dumps(record) + "\n" for record in records))


def numbered(record: dict[str, Any], number: int) -> dict[str, Any]:
    return {
        name: f"{value} ({number})" if isinstance(value, str) else value
        for name, value in record.items()
    }


def uniform(stand_in: Path) -> Callable[[dict[str, Any], str, str], dict[str, Any]]:
    """What an endpoint says of its tokens that finds all ids as likely, where it is asked."""
    renderer = Renderer(stand_in, {})
    logprob = -float(np.log(len(renderer.tokenizer)))
    letters = [{"token": chr(97 + n), "logprob": logprob} for n in range(20)]

    def said(body: dict[str, Any], _: str, text: str) -> dict[str, Any]:
        if not body.get("logprobs"):
            return {}
        ids, spans = renderer.given(
            {"messages": body["messages"], "completion": text.strip()}, last=True
        )
        start, count = spans[0].tolist()
        names = [renderer.tokenizer.decode([one]) for one in ids[start : start + count]]
        content = [{"token": n, "logprob": logprob, "top_logprobs": letters} for n in names]
        return {"logprobs": {"content": content}, "usage": None}

    return said


def commands(folder: Path) -> Path:
    """A folder with `stillroom` and `python` as a user's shell finds them."""
    (folder / "bin").mkdir()
    for name, words in {"stillroom": "-m stillroom ", "python": ""}.items():
        script = folder / "bin" / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {words}"$@"\n')
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return folder / "bin"


@pytest.mark.slow
@pytest.mark.parametrize("guide", sorted(GUIDES.glob("*.md")), ids=lambda guide: guide.stem)
def test_every_command_of_a_guide_runs(
    guide: Path, stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hf"
    for name in names(guide):
        put_under(name, stand_in, cache)
    monkeypatch.setenv("HF_HOME", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setenv("PATH", f"{commands(tmp_path)}:{os.environ['PATH']}")
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MY_API_KEY", KEY)
    ran = 0
    with endpoint(tokens=uniform(stand_in)) as served:
        for block in blocks(guide):
            if block.title:
                write_file(block, folder, served.url)
            elif block.language == "sh":
                for line in block.text.splitlines():
                    do(line)
                    ran += 1
    assert ran


def do(line: str) -> None:
    """Do one line of a guide.

    It runs in this process if it is a command of ours and nothing else, in a shell if not.
    """
    words = shlex.split(line)
    if words[0] == "stillroom" and "||" not in words:
        stillroom(*words[1:])
        return
    done = subprocess.run(["sh", "-ec", line], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


def test_the_guides_are_all_named_in_the_readme() -> None:
    readme = (GUIDES.parents[1] / "README.md").read_text()
    assert [
        guide.name
        for guide in sorted(GUIDES.glob("*.md"))
        if f"pipeline/guides/{guide.name}" not in readme
    ] == []


def test_every_fenced_block_is_a_file_or_commands() -> None:
    """So that nothing looks like a command and is not run."""
    for guide in GUIDES.glob("*.md"):
        assert guide.read_text().count("\n```") == 2 * len(blocks(guide))
        assert {block.language for block in blocks(guide) if not block.title} <= {"sh"}


FLOORS = [GUIDES.parents[1] / floor for floor in ("storage", "stages", "pipeline")]
PAGES = [
    GUIDES.parents[1] / "README.md",
    *(page for floor in FLOORS for page in sorted(floor.rglob("*.md"))),
]
FILES = ("py", "json", "md", "html", "yaml", "log")


@pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: page.relative_to(GUIDES.parents[1]).as_posix()
)
def test_fields_that_a_page_names_are_in_the_recipe(page: Path) -> None:
    unknown = []
    for name in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)\b[^`]*`", page.read_text()):
        section, *fields = name.split(".")
        if section in Recipe.model_fields and fields[-1] not in FILES:
            known = load._keys_at((section, *fields[:-1]))
            unknown += [] if not known or fields[-1] in known else [name]
    assert not unknown


@pytest.mark.parametrize("guide", sorted(GUIDES.glob("*.md")), ids=lambda guide: guide.stem)
def test_recipes_of_a_guide_are_right_together(guide: Path, tmp_path: Path) -> None:
    for block in blocks(guide):
        if block.language == "yaml":
            path = tmp_path / (block.title or "recipe.yaml")
            path.write_text(block.text)
            load.load_recipe(path)


def test_the_formats_and_their_fields_are_those_of_the_table() -> None:
    """A conversation's record has other shapes too, which the table names."""
    rows = re.findall(
        r"^\| `(\w+)` \| ([^|]*) \|", (GUIDES / "own-data.md").read_text(), re.MULTILINE
    )
    assert {name for name, _ in rows} == set(FORMATS)
    for name, record in rows:
        fields = set(re.findall(r"`(\w+)`", record)) - {"conversations"}
        assert set(FORMATS[name].required) <= fields <= set(FORMATS[name].columns)
