"""A BERT-class teacher of labelled texts, trained on the spot.

It has fresh weights and no pretraining, and its words are hidden at random.

Its vocabulary is the part of BERT's that the training texts have. It is kept as it was after the
epoch that was best on texts for choosing.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from assets import ASSETS
from torch import Tensor, nn

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SEEN = 2
"""A piece of text is in the vocabulary if the training texts have it this often."""


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
    attention_dropout: float = 0.1
    """Of the attention's weights; 0 takes less time on a CPU."""


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


def read_texts(dataset: str, split: str, limit: int | None = None) -> Sentences:
    """One of a data set's own splits; the first `limit`."""
    import pyarrow.parquet as pq

    table = pq.read_table(ASSETS / "classify" / dataset / f"{split}.parquet")[:limit]
    return Sentences(table["text"].to_pylist(), np.asarray(table["label"], np.int64))


def naive_bayes(
    train: Sentences, test: Sentences, words: Callable[[str], list[str]] = str.split
) -> float:
    """Accuracy of multinomial naive Bayes on words, add-one smoothing: what any teacher must beat.

    A word that training has not seen says nothing.
    """
    known = sorted({word for text in train.texts for word in words(text)})
    places = {word: place for place, word in enumerate(known)}

    def counts(text: str) -> np.ndarray:
        found = [places[word] for word in words(text) if word in places]
        return np.bincount(np.array(found, np.int64), minlength=len(places))

    of_class = np.zeros((int(train.labels.max()) + 1, len(places)))
    for text, label in zip(train.texts, train.labels, strict=True):
        of_class[label] += counts(text)
    # log (count + 1) / (words of the class + size of the vocabulary)
    logs = np.log((of_class + 1) / (of_class.sum(axis=1, keepdims=True) + len(places)))
    with np.errstate(divide="ignore"):  # a class that training lacks is never found
        prior = np.log(np.bincount(train.labels) / len(train))
    found = [(prior + logs @ counts(text)).argmax() for text in test.texts]
    return float((np.array(found) == test.labels).mean())


def small_tokenizer(texts: Sequence[str]) -> Any:
    """BERT's uncased WordPiece with a part of its pieces.

    They are only those that the texts have, and single characters.
    """
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


def train_teacher(
    folder: Path, train: Sentences, validation: Sentences, *, size: Size, names: Sequence[str]
) -> None:
    """Train a teacher on labels and save it, as it was after the epoch that is best on validation.

    Args:
        folder: Where it is saved.
        train: What it learns.
        validation: What decides which epoch is kept.
        size: How large it is, and how it is trained.
        names: Of the classes.
    """
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    tokenizer = small_tokenizer(train.texts)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.hidden,
        attention_probs_dropout_prob=size.attention_dropout,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    model = BertForSequenceClassification(config)
    ids, judged = (tokenizer(part.texts)["input_ids"] for part in (train, validation))
    best, kept = -1.0, dict[str, Tensor]()
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
    """Train an epoch, give its mean loss, and so on.

    The optimizer is AdamW with 50 steps of warm-up, then linear to 0.
    """
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
