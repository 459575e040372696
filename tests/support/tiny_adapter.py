"""LoRA adapters of a tiny BERT that classifies, and of causal models.

Those of BERT are trained on the spot, with their bases; the others are random.
"""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tiny_models import CLASSES, save_tiny_bert
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

NAMES: dict[str, Any] = {
    "id2label": dict(enumerate(CLASSES)),
    "label2id": {name: index for index, name in enumerate(CLASSES)},
}
TEXTS = ("the cat sat", "a big red dog ran", "it was happy and small", "then the mat")


def save_base(folder: Path, *, head: bool = False, **overrides: Any) -> Path:
    """A tiny BERT with a head over `CLASSES`, or its body alone, which knows no classes."""
    save_tiny_bert(folder, **overrides)
    if not head:
        body = AutoModel.from_pretrained(folder)
        for name in ("id2label", "label2id"):
            delattr(body.config, f"_{name}" if hasattr(body.config, f"_{name}") else name)
        body.save_pretrained(folder)
    return folder


def save_adapter(
    folder: Path, base: Path, *, steps: int = 4, config: bool = True, **lora: Any
) -> Path:
    """Train LoRA and a head on a few labelled texts.

    `config` saves the model's config beside them.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(steps)
        model = AutoModelForSequenceClassification.from_pretrained(base, **NAMES)
        settings = {"task_type": "SEQ_CLS", "r": 4, "target_modules": ["query", "value"]} | lora
        adapted = get_peft_model(model, LoraConfig(**settings))
        tokenizer = AutoTokenizer.from_pretrained(base)
        inputs = tokenizer(list(TEXTS), padding=True, return_tensors="pt")
        optimizer = torch.optim.Adam((p for p in adapted.parameters() if p.requires_grad), lr=0.05)
        for _ in range(steps):
            adapted(**inputs, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    adapted.save_pretrained(folder)
    if config:
        model.config.save_pretrained(folder)
    return folder


def save_random_adapter(folder: Path, base: Path, *, rank: int = 4) -> Path:
    """One of a causal model, whose numbers are drawn."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rank)
        model = AutoModelForCausalLM.from_pretrained(base)
        settings: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": rank}
        adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", **settings))
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.05)
        adapted.save_pretrained(folder)
    return folder
