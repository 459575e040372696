"""A BERT-class teacher of sentiment, trained on the spot: fresh weights, sst2's training sentences, no pretraining.

sst2's own test split judges; which of its training rows are for choosing is decided by the product's
own hash of a text. So the teacher has seen no row that `stillroom run pipeline/recipes/sst2.yaml`
validates on or holds out.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import environ
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stillroom.storage.keys import content_key

ASSETS = Path(environ.get("STILLROOM_ASSETS", Path(__file__).parents[3] / "shared" / "assets"))
NAMES = ("negative", "positive")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VALIDATION = 872
"""Rows for choosing, as many as sst2's own; the recipe says the same."""
SEEN = 2
"""A piece of text is in the vocabulary if the training sentences have it this often."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large the teacher is and how it is trained."""

    hidden: int
    layers: int
    epochs: int
    learning_rate: float
    heads: int = 4
    rows: int = 32
    """Sentences of a step."""
    masked: float = 0.4
    """Share of the words that training hides, anew each time: what keeps so small a set from being
    learnt by heart."""


@dataclass(frozen=True)
class Sentences:
    """Texts and gold labels."""

    texts: list[str]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int] | np.ndarray) -> "Sentences":
        """Some of them."""
        return Sentences([self.texts[row] for row in rows], self.labels[np.asarray(rows, np.int64)])


def read_sentences(split: str, limit: int | None = None) -> Sentences:
    """One of sst2's own splits, train or test; the first `limit`."""
    import pyarrow.parquet as pq

    table = pq.read_table(ASSETS / "classify" / "sst2" / f"{split}.parquet")[:limit]
    return Sentences(table["text"].to_pylist(), np.asarray(table["label"], np.int64))


def split(train: Sentences, test: Sentences, *, validation: int) -> dict[str, Sentences]:
    """What the recipe judges on, what it validates on and the rest: the smallest hashes first, as it does.

    A text that is in both splits is not trained on.
    """
    judging, keys = set(prompt_keys(test.texts)), prompt_keys(train.texts)
    choosing = set(sorted(set(keys) - judging)[:validation])
    rows: dict[str, list[int]] = {"validation": [], "train": []}
    for row, key in enumerate(keys):
        if key not in judging:
            rows["validation" if key in choosing else "train"].append(row)
    return {"test": test, **{name: train.take(found) for name, found in rows.items()}}


def prompt_keys(texts: Sequence[str]) -> list[bytes]:
    """The store's names of texts."""
    return [content_key("prompt", text=text, messages=None, pair=None) for text in texts]


def naive_bayes(train: Sentences, test: Sentences) -> float:
    """Accuracy of multinomial naive Bayes on words, add-one smoothing: what any teacher must beat."""
    counts = [
        Counter(w for t in train.take(np.flatnonzero(train.labels == c)).texts for w in t.split())
        for c in (0, 1)
    ]
    words = set(counts[0]) | set(counts[1])
    totals = [c.total() + len(words) for c in counts]
    prior = math.log((train.labels == 1).mean() / (train.labels == 0).mean())
    odds = {
        word: math.log((counts[1][word] + 1) / totals[1] * totals[0] / (counts[0][word] + 1))
        for word in words
    }
    found = [prior + sum(odds.get(word, 0.0) for word in text.split()) > 0 for text in test.texts]
    return float((np.array(found) == test.labels).mean())


def small_tokenizer(texts: Sequence[str]) -> Any:
    """BERT's uncased WordPiece with only those pieces that the texts have, and single characters."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    whole = Tokenizer.from_file(
        str(ASSETS / "models" / "tokenizer-bert-base-uncased" / "tokenizer.json")
    )
    counts = Counter(
        piece
        for e in whole.encode_batch(list(texts), add_special_tokens=False)
        for piece in e.tokens
    )
    pieces = sorted(whole.get_vocab(), key=lambda piece: whole.token_to_id(piece))
    kept = [
        p
        for p in pieces
        if p in SPECIAL or counts[p] >= SEEN or (len(p.removeprefix("##")) == 1 and p.isascii())
    ]
    ids = {piece: i for i, piece in enumerate(kept)}
    described = json.loads(whole.to_str())
    described["model"]["vocab"] = ids
    for token in described["added_tokens"]:
        token["id"] = ids[token["content"]]
    for name, token in described["post_processor"]["special_tokens"].items():
        token["ids"] = [ids[name]]
    names = {f"{name.strip('[]').lower()}_token": name for name in SPECIAL}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(described)), **names
    )


def train_teacher(folder: Path, train: Sentences, validation: Sentences, size: Size) -> None:
    """Train a teacher on labels and save it, as it was after the epoch that is best on validation."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    tokenizer = small_tokenizer(train.texts)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.hidden,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        id2label=dict(enumerate(NAMES)),
        label2id={name: index for index, name in enumerate(NAMES)},
    )
    model = BertForSequenceClassification(config)
    ids, judged = (tokenizer(part.texts)["input_ids"] for part in (train, validation))
    best, kept = 0.0, dict[str, Tensor]()
    for epoch, loss in enumerate(
        _epochs(model, ids, train.labels, size, mask=tokenizer.mask_token_id), 1
    ):
        accuracy = float(
            (predict(model, judged).argmax(-1) == torch.from_numpy(validation.labels))
            .float()
            .mean()
        )
        print(
            (
                f"teacher, epoch {epoch}/{size.epochs}: loss {loss:.3f}, validation accuracy "
                f"{accuracy:.4f}"
            ),
            flush=True,
        )
        if accuracy > best:
            best, kept = (
                accuracy,
                {name: tensor.clone() for name, tensor in model.state_dict().items()},
            )
    model.load_state_dict(kept)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _epochs(
    model: nn.Module, ids: list[list[int]], labels: np.ndarray, size: Size, *, mask: int
) -> Iterator[float]:
    """Train an epoch, give its mean loss, and so on: AdamW, 50 steps of warm-up, then linear to 0."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=size.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    total, step = size.epochs * math.ceil(len(ids) / size.rows), 0
    rng, gold = np.random.default_rng(0), torch.from_numpy(labels)
    for _ in range(size.epochs):
        losses = []
        model.train()
        for batch in _batches(ids, size.rows, rng):
            for group in optimizer.param_groups:
                group["lr"] = size.learning_rate * min(1, (step + 1) / 50) * (1 - step / total)
            tokens, attention = _padded([ids[row] for row in batch])
            hidden = (torch.rand(tokens.shape) < size.masked) & (tokens >= len(SPECIAL))
            logits = model(
                input_ids=tokens.masked_fill(hidden, mask), attention_mask=attention
            ).logits
            loss = nn.functional.cross_entropy(logits, gold[batch])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            step += 1
        yield float(np.mean(losses))


def _batches(ids: list[list[int]], rows: int, rng: np.random.Generator) -> list[np.ndarray]:
    """All rows once, at random, like lengths together: sorted within sixteen batches."""
    order, found = rng.permutation(len(ids)), []
    for start in range(0, len(ids), 16 * rows):
        near = sorted(order[start : start + 16 * rows], key=lambda row: len(ids[row]))
        found += [np.array(near[at : at + rows]) for at in range(0, len(near), rows)]
    rng.shuffle(found)
    return found


def _padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, [B, T] each; the padding's id is 0."""
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    return tokens, (
        torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]
    ).long()


@torch.no_grad()
def predict(model: nn.Module, ids: list[list[int]]) -> Tensor:
    """[B, C] logits."""
    model.eval()
    found = [
        model(
            **dict(zip(("input_ids", "attention_mask"), _padded(ids[at : at + 64]), strict=True))
        ).logits
        for at in range(0, len(ids), 64)
    ]
    return torch.cat(found)
