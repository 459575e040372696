"""A teacher with a real vocabulary, trained here in minutes on two cores.

It has GPT-2's 50,257 tokens and learns real text.

A small Llama with tied embeddings and a bias on its logits that starts at the log of how often each
token occurs. The cross-entropy is the real one, over the whole vocabulary; its two matrix products
run in bfloat16, a chunk at a time.
"""

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from assets import ASSETS
from torch import Tensor, nn

from stillroom.stages.models.head import Head

CHUNK_TOKENS = 512
HELD_OUT = 0.15
"""Share of the end of each text that no model is trained on."""


@dataclass(frozen=True)
class Size:
    """How large a model is and how long it is trained."""

    hidden: int
    layers: int
    steps: int
    learning_rate: float
    step_tokens: int = 2048
    window: int = 256


def texts() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Token ids to train on and held out, by source.

    The sources are TinyStories and WikiText-2 (its two small files).
    """
    import pyarrow.parquet as pq
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(ASSETS / "models" / "tokenizer-gpt2" / "tokenizer.json"))
    end = tokenizer.token_to_id("<|endoftext|>")
    stories = pq.read_table(ASSETS / "text" / "tinystories-8k" / "train.parquet", columns=["text"])[
        "text"
    ].to_pylist()
    wiki = [
        (ASSETS / "text" / "wikitext2-valid-test" / f"{name}.txt").read_text()
        for name in ("valid", "test")
    ]
    articles = "".join(wiki).split("\n \n")
    train, held_out = {}, {}
    for name, documents in {"tinystories": stories, "wikitext": articles}.items():
        encoded = tokenizer.encode_batch(documents)
        ids = np.concatenate([np.array([*e.ids, end], np.int32) for e in encoded])
        stop = int(len(ids) * (1 - HELD_OUT))
        train[name], held_out[name] = ids[:stop], ids[stop:]
    return train, held_out


class SmallModel(nn.Module):
    """Hidden states [B, T, D] of token ids [B, T]; `head` makes logits of them."""

    def __init__(self, vocab_size: int, size: Size) -> None:
        from transformers import LlamaConfig, LlamaModel

        super().__init__()
        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=size.hidden,
            intermediate_size=3 * size.hidden,
            num_hidden_layers=size.layers,
            num_attention_heads=max(1, size.hidden // 32),
            max_position_embeddings=size.window,
        )
        self.body = LlamaModel(config)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, ids: Tensor) -> Tensor:
        """Hidden states after the final norm."""
        return self.body(input_ids=ids, use_cache=False).last_hidden_state

    @property
    def head(self) -> Head:
        """The output head; its weight is the embedding's."""
        return Head(weight=self.body.embed_tokens.weight, bias=self.bias)


class _CrossEntropy(torch.autograd.Function):
    """Mean over N of logsumexp(z) - z_y, and its gradient, with logits [chunk, V] at a time."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, following: Tensor
    ) -> Tensor:
        small = weight.bfloat16()
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        grad_bias, total = torch.zeros_like(bias), 0.0
        for i in range(0, len(hidden), CHUNK_TOKENS):
            states, label = (
                hidden[i : i + CHUNK_TOKENS].bfloat16(),
                following[i : i + CHUNK_TOKENS, None],
            )
            logprobs = (states @ small.T).float().add_(bias).log_softmax(-1)
            total -= float(logprobs.gather(1, label).sum())
            grad = logprobs.exp_().scatter_add_(
                1, label, torch.full_like(label, -1.0, dtype=torch.float32)
            )
            grad_bias += grad.sum(0)
            half = grad.bfloat16()
            grad_hidden[i : i + CHUNK_TOKENS] = (half @ small).float()
            grad_weight += (half.T @ states).float()
        ctx.save_for_backward(
            grad_hidden / len(hidden), grad_weight / len(hidden), grad_bias / len(hidden)
        )
        return torch.tensor(total / len(hidden))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        return hidden * grads[0], weight * grads[0], bias * grads[0], None


def windows(ids: np.ndarray, length: int) -> Tensor:
    """[B, length + 1] windows that overlap by one token; what is left over is dropped."""
    count = (len(ids) - 1) // length
    return torch.from_numpy(
        np.stack([ids[i * length : (i + 1) * length + 1] for i in range(count)]).astype(np.int64)
    )


def train(size: Size, data: dict[str, np.ndarray], vocab_size: int, *, seed: int) -> SmallModel:
    """A fresh model, trained; says how it goes."""
    torch.manual_seed(seed)
    model = SmallModel(vocab_size, size)
    rows = torch.cat([windows(ids, size.window) for ids in data.values()])
    counts = torch.bincount(rows.reshape(-1), minlength=vocab_size).double() + 0.1
    model.bias.data = (counts / counts.sum()).log().float()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=size.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    per_step, began = size.step_tokens // size.window, time.monotonic()
    order, smooth = torch.randperm(len(rows)), float("nan")
    for step in range(size.steps):
        rate = min(1.0, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * step / size.steps))
        for group in optimizer.param_groups:
            group["lr"] = size.learning_rate * rate
        batch = rows[order[torch.arange(step * per_step, (step + 1) * per_step) % len(rows)]]
        hidden = model(batch[:, :-1]).flatten(0, 1)
        loss = _CrossEntropy.apply(
            hidden, model.body.embed_tokens.weight, model.bias, batch[:, 1:].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        smooth = loss.item() if step == 0 else 0.95 * smooth + 0.05 * loss.item()
        if step % 50 == 49 or step + 1 == size.steps:
            seconds = time.monotonic() - began
            print(
                f"step {step + 1}/{size.steps}  cross-entropy {smooth:.3f} nats  {seconds:.0f} s",
                flush=True,
            )
    return model.eval()


@torch.no_grad()
def cross_entropy(model: SmallModel, ids: np.ndarray, *, window: int, limit: int) -> float:
    """Mean over at most `limit` tokens, nats."""
    batch = windows(ids, window)[: max(1, limit // window)]
    hidden = model(batch[:, :-1]).flatten(0, 1)
    return float(
        _CrossEntropy.apply(
            hidden, model.body.embed_tokens.weight, model.bias, batch[:, 1:].flatten()
        ).item()
    )
