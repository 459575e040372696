"""What `fuzz.py` damages: a small store, run, published folder, recipes and data, all valid.

What is run on them.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from kit import prompts, recipe_tree, stillroom, write_jsonl
from tiny_images import save_tiny_resnet, write_folder
from tiny_llama import WORDS, save_tiny_llama
from tiny_masks import save_tiny_masked, texts
from tiny_words import save_tiny_tagger, tagged

from stillroom.stages.recipe.sections import Recipe

Words = list[str]


_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}{% if tools %}{{ tools }}{% endif %}"
)


class World:
    """A store, a run, a published folder, recipes and data, all valid.

    There is a copy of them to damage.
    """

    def __init__(self, root: Path) -> None:
        self._begin(root)
        self.teacher = save_tiny_llama(root / "teacher")
        (self.teacher / "chat_template.jinja").write_text(_TEMPLATE)
        source = write_jsonl(self.work / "prompts.jsonl", prompts(14))
        tree = recipe_tree(
            self.work, self.teacher, source, train={"epochs": 1, "tokens_per_step": 128}
        )
        self.write("recipe.yaml", yaml.safe_dump(tree).encode())
        stillroom("run", self.work / "recipe.yaml", "--quiet")
        for index, options in enumerate(([], ["--run", self.work / "run"])):
            where = self.work / f"published-{index}"
            stillroom("export", self.work / "store", where, "--license", "mit", *options)
        self._recipes(tree)
        self._interrupted(tree)
        self.work.rename(self._valid)

    def _begin(self, root: Path) -> None:
        self.root, self.work, self._valid = root, root / "work", root / "valid"
        root.mkdir(parents=True)
        self.work.mkdir()

    def _recipes(self, tree: dict[str, Any]) -> None:
        """Write other recipes on the same world.

        They are from the published folder, and stage one of each format of data.
        """
        published = str(self.work / "published-0")
        storage = {"dir": str(self.work / "new"), "sources": [published]}
        sourced = tree | {"storage": storage}
        self.write("with_source.yaml", yaml.safe_dump(sourced).encode())
        alone = {"teacher": {"model": published}, "data": tree["data"] | {"source": published}}
        self.write("from_published.yaml", yaml.safe_dump(sourced | alone).encode())
        every_field = Recipe.model_validate(tree).model_dump(mode="json")
        self.write("every_field.yaml", yaml.safe_dump(every_field).encode())
        for name, records in RECORDS.items():
            stage_one = {key: tree[key] for key in ("run", "teacher", "generate", "score")}
            if name in ("text", "completion"):
                del stage_one["generate"]
            stage_one |= {
                "storage": {"dir": str(self.work / "new")},
                "data": {"source": "?", "format": name, "holdout": 0},
            }
            self.write(f"data-{name}.yaml", yaml.safe_dump(stage_one).encode())
            write_jsonl(self.work / f"data-{name}.jsonl", records)

    def _interrupted(self, tree: dict[str, Any]) -> None:
        """A run that was stopped after its last checkpoint."""
        stopped = self.work / "stopped"
        shutil.copytree(self.work / "run", stopped, symlinks=True)
        for name in ("train.json", "evaluation.json"):
            next(stopped.glob(f"train-*/{name}")).unlink()
        recipe = tree | {"run": {"dir": str(stopped)}}
        self.write("stopped.yaml", yaml.safe_dump(recipe).encode())

    def fresh(self) -> None:
        """Everything as it was."""
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self._valid, self.work, symlinks=True)

    def write(self, name: str, data: bytes) -> None:
        """A file of the copy."""
        (self.work / name).write_bytes(data)

    def files(self, pattern: str) -> list[Path]:
        """Files of the copy, in the order of their names."""
        return sorted(path for path in self.work.glob(pattern) if path.is_file())

    def outside(self) -> list[tuple[str, float]]:
        """What lies beside the copy, which no command may change."""
        beside = [self.root, *self._valid.rglob("*"), *self.teacher.rglob("*")]
        entries = [path for path in self.root.iterdir() if path != self.work]
        return [(str(path), path.stat().st_mtime if path.is_file() else 0) for path in beside] + [
            (path.name, 0) for path in sorted(entries)
        ]


class OtherWorld(World):
    """The store of another task, up to its targets, with its recipe: what `ON_STORE` damages."""

    def __init__(self, root: Path, task: str) -> None:
        self._begin(root)
        save, kind, write = OTHER_TASKS[task]
        self.teacher = save(root / "teacher")
        source = write(self.work)
        sections: dict[str, Any] = {
            "run": {"dir": str(self.work / "run"), "task": task},
            "data": {"source": str(source), "format": kind, "holdout": 3},
            "student": {"model": str(self.teacher)},
            "score": {"targets": "topk", "k": 4} if kind == "text" else {"targets": "full"},
            "train": {"epochs": 1, "tokens_per_step": 64},
        }
        tree = recipe_tree(self.work, self.teacher, source, generate=None, **sections)
        self.write("recipe.yaml", yaml.safe_dump(tree).encode())
        stillroom("run", self.work / "recipe.yaml", "--quiet", "--until", "score")
        self.work.rename(self._valid)


OTHER_TASKS: dict[str, tuple[Callable[[Path], Path], str, Callable[[Path], Path]]] = {
    "token_classification": (
        save_tiny_tagger,
        "tagged",
        lambda folder: write_jsonl(folder / "rows.jsonl", tagged(14)),
    ),
    "masked_lm": (
        save_tiny_masked,
        "text",
        lambda folder: write_jsonl(folder / "rows.jsonl", texts(14)),
    ),
    "image_classification": (
        save_tiny_resnet,
        "images",
        lambda folder: write_folder(folder / "pictures", 14),
    ),
}
"""Task -> its teacher, the format of its records, and a source of them."""
ON_STORE = ("records", "other records", "shards")
"""Targets that are part of a store."""

RECORDS: dict[str, list[dict[str, Any]]] = {
    "prompt": prompts(6),
    "text": [{"text": " ".join(WORDS[i : i + 9])} for i in range(6)],
    "completion": [{"prompt": f"the {WORDS[i]}", "completion": "sat"} for i in range(6)],
    "instruction": [
        {"instruction": "the cat", "input": WORDS[i], "output": "sat"} for i in range(6)
    ],
    "messages": [
        {
            "messages": [
                {"role": "user", "content": f"the {WORDS[i]}"},
                {"role": "assistant", "content": "sat"},
            ],
            "tools": [{"name": "x", "parameters": {"type": "object"}}],
        }
        for i in range(6)
    ],
}


def words_of(*words: Any) -> Words:
    """A command line."""
    return [str(word) for word in words]


def on_store(world: World) -> list[Words]:
    """Every command that reads a store."""
    store, recipe = world.work / "store", world.work / "recipe.yaml"
    return [
        words_of("verify", store),
        words_of("plan", recipe, "--json"),
        words_of("status", recipe, "--json"),
        *(words_of("query", store, f"SELECT * FROM {view}", "--json") for view in VIEWS),
        words_of("inspect", store, "--json"),
        words_of("export", store, world.work / "exported", "--license", "mit"),
        words_of("vacuum", store, "--older-than-hours", 0),
        words_of("repair", store, "--json"),
        words_of("run", recipe, "--quiet", "--until", "train"),
        words_of("run", recipe, "--quiet", "--until", "train", "--set", "train.learning_rate=0.01"),
    ]


VIEWS = ("prompts", "generations", "soft_targets", "rejects", "commits", "inputs")


def on_run(world: World) -> list[Words]:
    """Every command that reads a run's folder."""
    recipe, run = world.work / "recipe.yaml", world.work / "run"
    return [
        words_of("report", run, "--json"),
        words_of("report", run, run, "--out", world.work / "page.html"),
        words_of("status", recipe, "--json"),
        words_of("plan", recipe, "--json"),
        words_of("inspect", run, "--json"),
        words_of("run", recipe, "--quiet"),
        words_of("plan", world.work / "stopped.yaml", "--json"),
        words_of("run", world.work / "stopped.yaml", "--quiet", "--until", "train"),
        words_of(
            *("export", world.work / "store", world.work / "exported"),
            *("--license", "mit", "--run", run),
        ),
    ]


def on_published(world: World) -> list[Words]:
    """Every command that reads a published folder."""
    folder = world.work / "published-0"
    return [
        words_of("plan", world.work / "from_published.yaml", "--json"),
        words_of("plan", world.work / "with_source.yaml", "--json"),
        words_of("run", world.work / "from_published.yaml", "--quiet", "--until", "train"),
        words_of("run", world.work / "with_source.yaml", "--quiet", "--until", "train"),
        words_of("verify", folder),
        words_of("export", world.work / "store", folder, "--license", "mit"),
        words_of(
            *("import", folder / "*" / "soft_targets" / "*.parquet", world.work / "imported"),
            *("--targets-at", "next"),
            *("--tokenizer", world.teacher, "--teacher-name", "t"),
            *("--columns", "tokens=token_ids,ids=ids,values=logprobs"),
        ),
    ]
