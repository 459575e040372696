"""The demonstration's ingredients, made on the spot without a network.

They are prompts, a tokenizer and a small teacher.

The text is English that every Python installation carries: the language reference behind `help()`,
and the docstrings and comments of the standard library. The teacher is trained for a fixed number
of seeded steps, never for a fixed time, and on one thread: sums then have one order however many
cores there are, and matrices this small wait long for a second core that is busy elsewhere.
`demo.json` is written last: it exists when everything else does.
"""

import ast
import json
import math
import random
import re
import statistics
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..stages.workers.job import Progress
from ..storage.errors import UsageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

RECIPE_FOLDER = "stillroom-demo"
"""The folder that the shipped recipe names; `make_demo` puts the real one in its place."""
START, END, PAD = "<|start|>", "<|end|>", "<|pad|>"
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}
_COMMENT = re.compile(r"(?:^[ \t]*#[ \t].*\n){2,}", re.MULTILINE)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sizes:
    """How large everything is; the tests make a smaller one."""

    vocabulary: int = 2048
    hidden: int = 192
    intermediate: int = 512
    layers: int = 4
    heads: int = 6
    context: int = 256
    steps: int = 1000
    windows: int = 2
    """Rows of `context` tokens in one step: few, as so short a training gains more from steps than
    from calm ones."""
    learning_rate: float = 3e-3
    documents: int | None = None
    """Use the first documents only; None: all."""
    prompts: int = 500
    prompt_tokens: tuple[int, int] = (16, 24)
    seed: int = 0


def make_demo(folder: Path, progress: Progress, *, sizes: _Sizes | None = None) -> Path:
    """Write teacher, prompts and recipe below `folder`, unless they are there.

    The recipe's path is returned.
    """
    sizes = sizes or _Sizes()
    recipe, manifest = folder / "recipe.yaml", folder / "demo.json"
    if _made_with(manifest, sizes):
        progress.say(f"there already: {folder / 'teacher'}")
        return recipe
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"--dir {folder}: no folder can be made there ({error.strerror}). Name another one."
        ) from error
    progress.say("reading the English that this Python carries")
    texts = documents()[: sizes.documents]
    progress.say(f"{len(texts):,} texts; training a tokenizer of {sizes.vocabulary:,} ids on them")
    tokenizer = _train_tokenizer(texts, sizes.vocabulary)
    progress.say(f"cutting {sizes.prompts:,} prompts out of them")
    rows = [_prompt(text, tokenizer, sizes) for text in texts]
    prompts = random.Random(sizes.seed).sample([row for row in rows if row], sizes.prompts)
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in prompts), encoding="utf-8"
    )
    facts = _make_teacher(folder / "teacher", texts, tokenizer, sizes=sizes, progress=progress)
    recipe.write_text(_recipe_text(folder), encoding="utf-8")
    manifest.write_text(
        json.dumps({"sizes": repr(sizes)} | facts, indent=2) + "\n", encoding="utf-8"
    )
    return recipe


def documents() -> list[str]:
    """The corpus, in a fixed order.

    It is one string per help topic, docstring or comment block, and prose only.
    """
    from pydoc_data.topics import topics

    found: dict[str, None] = {}
    for text in [*topics.values(), *_library_texts()]:
        prose = "\n".join(filter(_is_prose, _paragraphs(text)))
        if prose:
            found[prose] = None
    return sorted(found)


def _library_texts() -> Iterator[str]:
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in library.rglob("*.py"):
        if _SKIPPED.intersection(path.relative_to(library).parts):
            continue
        try:
            source = path.read_text("utf-8")
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue  # a few files of the library are broken on purpose, or in older encodings
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield ast.get_docstring(node) or ""
        for block in _COMMENT.findall(source):
            yield re.sub(r"^[ \t]*# ?", "", block, flags=re.MULTILINE)


def _paragraphs(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text):
        yield " ".join(paragraph.split())


def _is_prose(paragraph: str) -> bool:
    if (
        len(paragraph) < 60
        or not paragraph[0].isupper()
        or ">>>" in paragraph
        or not paragraph.isascii()
    ):
        return False
    plain = sum(character.isalpha() or character == " " for character in paragraph)
    return plain / len(paragraph) > 0.9


def _train_tokenizer(texts: list[str], vocabulary: int) -> "PreTrainedTokenizerFast":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[START, END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bare.train_from_iterator(texts, trainer)
    bare.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", special_tokens=[(START, bare.token_to_id(START))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bare, bos_token=START, eos_token=END, pad_token=PAD
    )


def _prompt(
    text: str, tokenizer: "PreTrainedTokenizerFast", sizes: _Sizes
) -> dict[str, str] | None:
    """The opening of a text, cut at the end of a word, and the rest.

    It is None where the text is too short for that.
    """
    shortest, longest = sizes.prompt_tokens
    places = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)[
        "offset_mapping"
    ]
    if len(places) <= longest:
        return None
    cut = text.rfind(" ", 0, places[longest][0] + 1)
    if sum(end <= cut for _, end in places) < shortest:
        return None
    return {"prompt": text[:cut], "reference": text[cut:].strip()}


def _make_teacher(
    folder: Path,
    texts: list[str],
    tokenizer: "PreTrainedTokenizerFast",
    *,
    sizes: _Sizes,
    progress: Progress,
) -> dict[str, Any]:
    import torch
    from transformers import GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    progress.say("tokenizing the texts that the teacher learns")
    windows = _windows(texts, tokenizer, sizes)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(sizes.seed)
            model = _fresh_model(tokenizer, sizes)
        loss = _train(model, windows, sizes=sizes, progress=progress)
    finally:
        torch.set_num_threads(threads)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    progress.say(
        f"{parameters / 1e6:.1f}M parameters, training loss {loss:.2f} nats/token: {folder}"
    )
    return {"parameters": parameters, "loss": loss, "corpus_characters": sum(map(len, texts))}


def _windows(
    texts: list[str], tokenizer: "PreTrainedTokenizerFast", sizes: _Sizes
) -> "torch.Tensor":
    """Shuffled documents end to end, cut into rows of context + 1 tokens."""
    import torch

    order = random.Random(sizes.seed).sample(range(len(texts)), len(texts))
    encoded = tokenizer(texts)["input_ids"]
    stream = [token for index in order for token in (*encoded[index], tokenizer.eos_token_id)]
    length = sizes.context + 1
    return torch.tensor(stream[: len(stream) // length * length]).view(-1, length)


def _fresh_model(tokenizer: "PreTrainedTokenizerFast", sizes: _Sizes) -> "PreTrainedModel":
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        head_dim=sizes.hidden // sizes.heads,
        max_position_embeddings=sizes.context,
        tie_word_embeddings=True,
        initializer_range=sizes.hidden**-0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return LlamaForCausalLM(config)


def _train(
    model: "PreTrainedModel", windows: "torch.Tensor", *, sizes: _Sizes, progress: Progress
) -> float:
    """Train with AdamW, and a cosine after a short warm-up.

    The mean loss of the last tenth of the steps is returned.
    """
    import torch
    from torch.nn.functional import cross_entropy

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=sizes.learning_rate, betas=(0.9, 0.95), weight_decay=0.1
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step / sizes.steps))
    generator = torch.Generator().manual_seed(sizes.seed)
    tokens = sizes.windows * sizes.context
    progress.start(total=sizes.steps * tokens, unit="tokens")
    order: list[int] = []
    losses: list[float] = []
    model.train()
    for _ in range(sizes.steps):
        if len(order) < sizes.windows:
            order += torch.randperm(len(windows), generator=generator).tolist()
        rows, order = windows[order[: sizes.windows]], order[sizes.windows :]
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        progress.advance(tokens, tokens=tokens, note=f"loss {losses[-1]:.2f}")
    model.eval()
    return statistics.mean(losses[-max(1, sizes.steps // 10) :])


def _rate(done: float) -> float:
    warm_up = 0.05
    return done / warm_up if done < warm_up else 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))


def _recipe_text(folder: Path) -> str:
    shipped = resources.files("stillroom.pipeline.recipes").joinpath("demo.yaml").read_text("utf-8")
    return shipped.replace(
        RECIPE_FOLDER, json.dumps(str(folder.resolve()), ensure_ascii=False)[1:-1]
    )


def _made_with(manifest: Path, sizes: _Sizes) -> bool:
    try:
        return bool(json.loads(manifest.read_text("utf-8"))["sizes"] == repr(sizes))
    except (OSError, ValueError, KeyError):
        return False
