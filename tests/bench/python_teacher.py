"""A teacher that is trained here: a small Llama on token ids, once through them or more.

CPU or GPU, bfloat16 autocast.

It is kept as a model folder that any recipe can name.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class TeacherSize:
    """How large the teacher is and how long it is trained."""

    hidden: int
    layers: int
    head_dim: int
    window: int
    tokens: int
    """Trained on so many, over and over where there are fewer."""
    step_tokens: int
    learning_rate: float
    autocast: bool = True
    """Compute in bfloat16, which CPUs without units for it do slowly."""


def llama(size: TeacherSize, vocab_size: int) -> nn.Module:
    """Fresh weights; embedding and head are tied."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=size.hidden,
        intermediate_size=3 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // size.head_dim,
        max_position_embeddings=size.window,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def train_teacher(folder: Path, ids: np.ndarray, *, size: TeacherSize, vocab_size: int) -> None:
    """Train a fresh model on windows of the ids."""
    torch.manual_seed(0)
    train_model(llama(size, vocab_size), folder, ids, size=size)


def train_model(model: nn.Module, folder: Path, ids: np.ndarray, *, size: TeacherSize) -> None:
    """Train on windows of the ids in a random order, then save into `folder`; says how it goes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device)
    count = (len(ids) - 1) // size.window
    rows = torch.from_numpy(ids[: count * size.window + 1].astype(np.int32))
    per_step = max(1, size.step_tokens // size.window)
    steps = max(1, size.tokens // (per_step * size.window))
    order = torch.cat([torch.randperm(count) for _ in range(-(-steps * per_step // count))])
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=size.learning_rate, betas=(0.9, 0.95), weight_decay=0.05, fused=True
    )
    smooth, began = None, time.monotonic()
    for step in range(steps):
        rate = min(1.0, (step + 1) / min(100, steps)) * (
            0.05 + 0.475 * (1 + math.cos(math.pi * step / steps))
        )
        for group in optimizer.param_groups:
            group["lr"] = size.learning_rate * rate
        starts = order[step * per_step : (step + 1) * per_step, None] * size.window
        batch = rows[starts + torch.arange(size.window + 1)].long().to(device)
        loss = _loss(model, batch, autocast=size.autocast)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49 or step + 1 == steps:
            smooth = loss.item() if smooth is None else 0.8 * smooth + 0.2 * loss.item()
            done, seconds = (step + 1) * per_step * size.window, time.monotonic() - began
            print(
                (
                    f"teacher: {done} tokens, cross-entropy {smooth:.3f} nats, "
                    f"{done / seconds:.0f} tokens/s"
                ),
                flush=True,
            )
    model.float().save_pretrained(folder)


def _loss(model: nn.Module, batch: Tensor, *, autocast: bool) -> Tensor:
    """Mean cross-entropy of [B, T + 1] ids."""
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=autocast):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
