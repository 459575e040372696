"""Which causal architectures of the installed transformers are right here, and which are refused.

The bench asks whether any is wrong.

    python tests/bench/architectures.py [CASE ...] [--tiny] [--out DIR]

It prints a table, then one line of JSON.

Each is a tiny model with random weights (`tiny_architectures.py`), saved, and loaded by the product
as teacher and as student. Texts have 9 to 64 tokens, windows 16; frequencies that depend on the
length change at 32.

    score   log-probabilities as the scoring stage stores them, against a float64 pass of
            transformers, nats
    batch   rows scored together against each alone, nats
    train   gradient of KL + 0.5 CE of the passes that training makes, against a loop over samples
            in plain transformers, as a share of its norm
    peek    how far logits of earlier positions move when the last token changes, as a share of the
            largest

A truth is a fresh model for each text, by eager attention; by transformers' usual one where eager
is known to be wrong. `--tiny` is a choice of them.
"""

import copy
import json
import logging
import sys
import tempfile
import warnings
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from tiny_architectures import CASES, LENGTHS, VOCABULARY, config_of, save
from torch import Tensor
from transformers import AutoModelForCausalLM

from stillroom.stages.ledger.requests import TargetRequest
from stillroom.stages.loader.causal_lm import training_passes
from stillroom.stages.loader.samples import Sample
from stillroom.stages.losses.objective import Aim, Objective
from stillroom.stages.models.causal_lm import KIND, load_causal_lm
from stillroom.stages.score import causal_lm
from stillroom.stages.score.scorer import Opened, Scorer
from stillroom.stages.targets.spec import Kept
from stillroom.storage.errors import UsageError
from stillroom.storage.tables.soft_targets import SoftTargets

SCORE, TRAIN, PEEK = 2e-4, 2e-5, 1e-6
"""Bars. A peek is 0 but for the rounding of experts, whose shapes change with the tokens that come
to them."""
HARD_WEIGHT = 0.5
USUAL_ATTENTION = ("falcon",)
"""`model_type`s whose eager attention is wrong: Falcon's adds ALiBi twice."""
TINY = (
    "llama",
    "llama, yarn rope",
    "llama, dynamic rope",
    "phi3, longrope",
    "llama, is_causal: false",
    "gemma2, cap 2",
    "gemma3_text, bidirectional",
    "bert-generation",
    "xlm",
    "llama4_text",
    "falcon, alibi",
    "falcon_h1, scaled",
    "gpt2",
    "qwen2, sliding",
    "qwen3_moe",
    "gpt_oss",
    "mamba",
    "lfm2",
    "bloom",
    "electra, decoder, narrow",
    "modernbert-decoder",
)


@dataclass(frozen=True)
class Row:
    """What came of one case."""

    case: str
    verdict: str
    """Right, Refused or Wrong."""
    score: float | None = None
    batch: float | None = None
    train: float | None = None
    peek: float | None = None
    said: str = ""
    """The product's words where it refuses; what failed where it is wrong."""


class Shared:
    """Stands where workers share rows: hands out all, and keeps what is made of them."""

    def __init__(self) -> None:
        self.rows: dict[bytes, SoftTargets] = {}

    def heartbeat(self) -> None: ...

    def done(self, requests: list[TargetRequest]) -> None: ...

    def take(self, requests: list[TargetRequest]) -> list[TargetRequest]:
        return requests

    def add(self, made: dict[str, list[dict[str, Any]]], *, tokens: int) -> None:
        for row in made["soft_targets"]:
            self.rows[row["tokens_key"]] = SoftTargets.from_row(row).normalised()

    def fail(self, request: TargetRequest, error: Exception, attempts: int) -> None:
        raise AssertionError(f"a row failed: {error}")

    def refuse(self, request: TargetRequest, error: Exception) -> None:
        raise AssertionError(f"a row was refused: {error}")


def texts() -> list[np.ndarray]:
    """Random token ids, without those that mean something."""
    rng = np.random.default_rng(0)
    return [rng.integers(3, VOCABULARY, n).astype(np.int32) for n in LENGTHS]


def measured(case: str) -> Row:
    """All four of a case, or why it is refused."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            save(config_of(case), folder)
        except Exception as error:
            return Row(case, "Not built", said=first_line(error))
        try:
            score, batch = scored(folder)
            found = {"score": score, "batch": batch, "peek": peeked(folder)}
            found["train"] = trained(folder)
        except UsageError as error:
            return Row(case, "Refused", said=first_line(error).replace(name, case))
        except Exception as error:
            return Row(case, "Wrong", said=first_line(error).replace(name, case))
    return judged(Row(case, "", **found))


def first_line(error: Exception) -> str:
    """Its kind and words."""
    kind = "" if isinstance(error, UsageError) else f"{type(error).__name__}: "
    return f"{kind}{error}".partition("\n")[0]


def judged(row: Row) -> Row:
    """A row with its verdict, where NaN is above every bar."""
    bars = ((row.score, SCORE), (row.batch, SCORE), (row.train, TRAIN), (row.peek, PEEK))
    right = all(value is not None and value <= bar for value, bar in bars)
    return replace(row, verdict="Right" if right else "Wrong")


def job(**train: Any) -> SimpleNamespace:
    """What a stage is handed, as far as it is asked here."""
    settings = {"row_tokens": None, "tokens_per_pass": 192, "kernel": None} | train
    recipe = SimpleNamespace(
        run=SimpleNamespace(task="causal_lm"),
        teacher=SimpleNamespace(device_map=None),
        storage=SimpleNamespace(mantissa_bits=23),
        train=SimpleNamespace(**settings),
        loss=SimpleNamespace(unstored_temperature="refuse"),
        score=None,
    )
    return SimpleNamespace(
        recipe=recipe,
        train=recipe.train,
        score=SimpleNamespace(kernel=None, features=[]),
        teacher_id="teacher",
        clock=SimpleNamespace(span=lambda _: nullcontext()),
        progress=SimpleNamespace(say=lambda _: None),
    )


def identity(folder: Path) -> SimpleNamespace:
    """Its identity, as far as it is asked here."""
    who = {"folder": folder, "id": b"", "dtype": "float32", "context_tokens": 1024}
    return SimpleNamespace(**who, adapter=None, runs_code=False, quantize=None, quantized="")


def scored(folder: Path) -> tuple[float, float]:
    """How far scored rows are from the truth, and from what they are alone."""
    who = identity(folder)
    kept = Kept(kind="full", k=VOCABULARY)
    requests = [
        TargetRequest(
            reuse_key=bytes([n]) * 16,
            tokens_key=bytes([n]) * 16,
            generation_key=bytes(16),
            prompt_key=bytes(16),
            token_ids=ids,
            spans=np.array([[1, len(ids) - 1]]),
            kept=kept,
        )
        for n, ids in enumerate(texts())
    ]
    together, alone = Shared(), Shared()
    teacher = causal_lm.Teacher(job(), who)  # type: ignore[arg-type]
    scorer: Any = Scorer(job(), together, Opened(who, "hf", teacher))  # type: ignore[arg-type]
    scorer.score(requests)
    scorer.collect()
    scorer._share = alone
    for request in reversed(requests):  # the long ones first: what they leave behind would show
        scorer.score([request])
        scorer.collect()
    rights = [truth.log_softmax(-1)[:-1].numpy() for truth in truths(folder, torch.float64)]
    score = batch = 0.0
    for request, right in zip(requests, rights, strict=True):
        beside, by_itself = (s.rows[request.tokens_key].logprobs for s in (together, alone))
        score = worst(score, beside - right, by_itself - right)
        batch = worst(batch, beside - by_itself)
    return score, batch


def worst(so_far: float, *differences: np.ndarray) -> float:
    """NaN stays."""
    return float(np.max([so_far, *(np.abs(d).max() for d in differences)]))


def plain(folder: Path, dtype: torch.dtype) -> Any:
    """The model of plain transformers, by the attention that is right."""
    config = transformers.AutoConfig.from_pretrained(folder)
    usual = config.model_type in USUAL_ATTENTION
    how = {} if usual else {"attn_implementation": "eager"}
    if getattr(config, "reorder_and_upcast_attn", False) or config.model_type == "xglm":
        dtype = torch.float32  # they refuse any other
    how["experts_implementation"] = "eager"  # the grouped products know no float64
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **how).eval()


def truths(folder: Path, dtype: torch.dtype) -> Iterator[Tensor]:
    """Logits [T, V] of each text, by a model that has read nothing before."""
    model = plain(folder, dtype)
    for ids in texts():
        with torch.no_grad():
            yield logits_of(copy.deepcopy(model), ids)


def logits_of(model: Any, ids: np.ndarray) -> Tensor:
    logits: Tensor = model(input_ids=torch.from_numpy(ids).long()[None], use_cache=False).logits[0]
    return logits


def peeked(folder: Path) -> float:
    """How far logits of the teacher, as it is loaded, move in a text of each length."""
    who: Any = identity(folder)
    model, found = load_causal_lm(who), 0.0
    for ids in texts():
        changed = ids.copy()
        changed[-1] = 3 + (ids[-1] + 1) % (VOCABULARY - 3)
        with torch.no_grad():
            first, other = (logits_of(model, text)[:-1].numpy() for text in (ids, changed))
        found = worst(found, (first - other) / np.abs(first).max())
    return found


def samples() -> list[Sample]:
    """The texts with a teacher's whole distribution, at random."""
    found = []
    for number, ids in enumerate(texts()):
        rng = np.random.default_rng(number)
        logits = torch.from_numpy(rng.normal(size=(len(ids) - 1, VOCABULARY)))
        logprobs = logits.log_softmax(-1).float().numpy()
        nothing = np.zeros(len(logprobs), np.float32)
        targets = SoftTargets(
            ids=None,
            logprobs=logprobs,
            tail_logprob=np.full_like(nothing, -np.inf),
            token_logprob=nothing,
            entropy=nothing,
        )
        found.append(Sample(token_ids=ids, spans=np.array([[1, len(ids) - 1]]), targets=targets))
    return found


def trained(folder: Path) -> float:
    """How far the gradient of the passes that training makes is off.

    It is compared with that of single samples in plain transformers.
    """
    student: Any = KIND.student(folder).train()  # as the trainer has it; dropout is zero
    read = samples()
    lengths = (min(LENGTHS), max(LENGTHS))
    passes = training_passes(
        student,
        job(),
        teacher_dir=folder,
        lengths=lengths,
        dtype=torch.float32,  # type: ignore[arg-type]
    )
    aim = Aim(objective=Objective(), soft_weight=1.0, hard_weight=HARD_WEIGHT)
    student.zero_grad()
    for batch in passes.batches(read):
        passes.losses(student, batch, aim=aim, dtype=torch.float32).total.backward()
    right: dict[str, Tensor] = {}
    model = plain(folder, torch.float32).train()
    for sample in read:
        fresh = copy.deepcopy(model)
        loss_alone(fresh, sample).backward()
        for name, parameter in fresh.named_parameters():
            if parameter.grad is not None:
                right[name] = right.get(name, 0.0) + parameter.grad.double()
    found = {n: p.grad.double() for n, p in student.named_parameters() if p.grad is not None}
    names = found.keys() | right.keys()
    nothing = torch.zeros(())
    off = sum(float((found.get(n, nothing) - right.get(n, nothing)).square().sum()) for n in names)
    return float((off / sum(float(part.square().sum()) for part in right.values())) ** 0.5)


def loss_alone(model: Any, sample: Sample) -> Tensor:
    """KL + 0.5 CE of one sample, as it is written.

    It is sum t (log t - log s) - 0.5 log s of what follows.
    """
    assert sample.targets is not None
    logprobs = logits_of(model, sample.token_ids)[:-1].log_softmax(-1)
    stored = torch.from_numpy(sample.targets.logprobs)
    following = torch.from_numpy(sample.token_ids[1:]).long()[:, None]
    divergence = (stored.exp() * (stored - logprobs)).sum()
    return divergence - HARD_WEIGHT * logprobs.gather(1, following).sum()


def table(rows: list[Row]) -> str:
    """Markdown; what is wrong comes first."""
    lines = ["| architecture | score | batch | train | peek | |", "|---|---:|---:|---:|---:|---|"]
    order = ("Wrong", "Not built", "Refused", "Right")
    for row in sorted(rows, key=lambda row: (order.index(row.verdict), row.case)):
        numbers = (row.score, row.batch, row.train, row.peek)
        cells = ["" if value is None else f"{value:.1e}" for value in numbers]
        said = row.verdict + (f": {row.said}" if row.said else "")
        lines.append(f"| {row.case} | {' | '.join(cells)} | {said.replace('|', '/')} |")
    return "\n".join(lines)


def main() -> None:
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help="only these")
    parser.add_argument("--tiny", action="store_true", help="a choice that runs in seconds")
    parser.add_argument("--out", type=Path, help="folder for the table as Markdown and the JSON")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    cases = asked.cases or (TINY if asked.tiny else tuple(CASES))
    rows = []
    for case in cases:
        rows.append(measured(case))
        print(rows[-1], file=sys.stderr, flush=True)
    report(rows, asked.out)


def report(rows: list[Row], folder: Path | None) -> None:
    """The table and the JSON line, and both as files."""
    kinds = ("Right", "Refused", "Wrong", "Not built")
    counts = {kind: sum(row.verdict == kind for row in rows) for kind in kinds}
    about = {"transformers": transformers.__version__, "torch": torch.__version__}
    outcome = json.dumps({**about, **counts, "rows": [asdict(row) for row in rows]})
    print(f"{table(rows)}\n{outcome}")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "architectures.json").write_text(outcome + "\n")
        said = ", ".join(f"{count} {kind.lower()}" for kind, count in counts.items())
        (folder / "architectures.md").write_text(f"{said}\n\n{table(rows)}\n")


if __name__ == "__main__":
    main()
