"""Masked language models.

A BERT guesses hidden tokens of stories, and so do small students of two layers.

    python tests/bench/masked_lm.py DIR [--seeds 0,1,2] [--tiny]

Texts are parts of the stories of the asset TinyStories, whose own splits are kept: what the teacher
learns, what students learn (some of it), what chooses learning rates, and what judges, which is
read once. A BERT is trained on the spot, its tokens hidden anew in each epoch. Students learn from
a part of these texts, their tokens hidden once: from the hidden tokens alone, and from the
teacher's best guesses as well. Each has the learning rate whose cross-entropy on validation texts
is best at the first seed. The last line is JSON.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow.parquet as pq
import token_types
import torch
from assets import ASSETS
from torch.nn import functional
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SHARE = 0.15


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes of everything."""

    texts: int = 12_000
    """Of the teacher's training."""
    student_texts: int = 1500
    judged: int = 600
    """Texts of validation and of test, each."""
    words: int = 40
    """Of a text."""
    vocabulary: int = 1000
    hidden: int = 96
    layers: int = 3
    teacher_epochs: int = 5
    student_hidden: int = 48
    epochs: int = 6
    rates: tuple[float, ...] = (1e-3, 3e-3, 9e-3, 27e-3)


SCALES = {
    "cpu": Scale(),
    "tiny": Scale(
        texts=64,
        student_texts=24,
        judged=12,
        vocabulary=200,
        hidden=16,
        layers=1,
        teacher_epochs=1,
        student_hidden=8,
        epochs=1,
        rates=(3e-3,),
    ),
}


def texts(part: str, words: int) -> Iterator[str]:
    """Parts of the stories of a split, of so many words each.

    What is left of a story is left out.
    """
    folder = ASSETS / "text" / "tinystories-8k"
    for story in pq.read_table(folder / f"{part}.parquet")["text"].to_pylist():
        found = story.split()
        for start in range(0, len(found) - words + 1, words):
            yield " ".join(found[start : start + words])


def some(part: str, many: int, words: int) -> list[str]:
    """So many of them, or all."""
    return [text for _, text in zip(range(many), texts(part, words), strict=False)]


def train_teacher(folder: Path, train: list[str], scale: Scale) -> None:
    """A BERT that has learnt to guess hidden tokens of these texts, and a tokenizer of their words.

    saved.
    """
    torch.manual_seed(0)
    tokenizer = _tokenizer(train, scale.vocabulary)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=scale.hidden,
        num_hidden_layers=scale.layers,
        num_attention_heads=4,
        intermediate_size=4 * scale.hidden,
        max_position_embeddings=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = BertForMaskedLM(config).train()
    made = tokenizer(
        train, padding="max_length", truncation=True, max_length=96, return_tensors="pt"
    )
    ids = made["input_ids"]
    steps = scale.teacher_epochs * max(1, len(ids) // 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, total_steps=steps, pct_start=0.1
    )
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        part = ids[torch.randint(len(ids), (64,), generator=generator)]
        loss = _loss(model, part[:, : int((part > 0).sum(1).max())], generator)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 99 or step == steps - 1:
            print(f"teacher: step {step + 1} of {steps}, loss {loss.item():.3f}", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _loss(model: Any, ids: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Cross-entropy where tokens are hidden, by BERT's rule."""
    hidden = (torch.rand(ids.shape, generator=generator) < SHARE) & (ids >= len(SPECIAL))
    fate = torch.rand(ids.shape, generator=generator)
    another = torch.randint(len(SPECIAL), model.config.vocab_size, ids.shape, generator=generator)
    instead = torch.where(fate < 0.8, torch.full_like(ids, SPECIAL.index("[MASK]")), ids)
    instead = torch.where((fate >= 0.8) & (fate < 0.9), another, instead)
    states = model.bert(torch.where(hidden, instead, ids), attention_mask=ids > 0)[0]
    return functional.cross_entropy(model.cls(states[hidden]), ids[hidden])


def _tokenizer(train: list[str], size: int) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=list(SPECIAL), show_progress=False
    )
    made.train_from_iterator(train, trainer)
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {f"{name.strip('[]').lower()}_token": name for name in SPECIAL}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=128, **names)


class Bench(token_types.Bench):
    """The folder of a run."""

    task, format = "masked_lm", "text"
    measures = ("cross_entropy", "accuracy", "kl_teacher", "top1_agreement")
    asked: ClassVar[dict[str, Any]] = {
        "score": {"targets": "topk", "k": 50, "temperatures": [2.0]},
        "loss": {"temperature": 2.0, "soft_weight": 0.5, "hard_weight": 0.5},
    }

    def prepare(self) -> None:
        """Texts and teacher, unless they are there."""
        if (self.folder / "teacher" / "model.safetensors").is_file():
            return
        scale = self.scale
        train = some("train", scale.texts, scale.words)
        chosen = np.random.default_rng(0).permutation(len(train))[: scale.student_texts]
        parts = {"student": [train[index] for index in chosen]}
        parts |= {name: some(name, scale.judged, scale.words) for name in ("validation", "test")}
        for name, found in parts.items():
            lines = "".join(json.dumps({"text": text}) + "\n" for text in found)
            (self.folder / f"{name}.jsonl").write_text(lines)
        train_teacher(self.folder / "teacher", train, scale)


if __name__ == "__main__":
    token_types.compare_arms(Bench, SCALES, __doc__)
