"""Tiny random models of several architectures, and random samples for them."""

import copy

import numpy as np
import torch
from tiny_llama import WORDS
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from stillroom.stages.loader.samples import Sample
from stillroom.storage.tables.soft_targets import SoftTargets

V = 24
SIZES = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "gemma2": Gemma2Config(**SIZES, sliding_window=4, query_pre_attn_scalar=8),
    "gpt2": GPT2Config(vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=64),
}


def build(config, **more):
    """A model with a config of its own: transformers writes into it which attention is used."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), **more).eval()


def make_sample(length, *, start=2, spans=None, k=5, seed=0, vocab=V):
    """A random sample, scored in its spans or else from `start` on.

    K = None: full targets, k = 0: none.
    """
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, vocab, length).astype(np.int32)
    spans = np.array(spans or [[start, length - start]])
    if k == 0:
        return Sample(token_ids=ids, spans=spans, targets=None)
    span = spans[:, 1].sum()
    logprobs = torch.from_numpy(rng.normal(size=(span, vocab))).log_softmax(-1)
    kept, order = logprobs.sort(-1, descending=True)
    entries, chosen = (
        (kept[:, :k], order[:, :k].numpy().astype(np.int32)) if k else (logprobs, None)
    )
    tail = kept[:, k:].logsumexp(-1) if k else torch.full((span,), -torch.inf)
    entries, tail = entries.float().numpy(), tail.float().numpy()
    nothing = np.zeros(span, np.float32)
    targets = SoftTargets(
        ids=chosen, logprobs=entries, tail_logprob=tail, token_logprob=nothing, entropy=nothing
    )
    return Sample(token_ids=ids, spans=spans, targets=targets)


def make_samples(lengths, **more):
    return [make_sample(n, seed=i, **more) for i, n in enumerate(lengths)]


LENGTHS = [9, 5, 14, 7, 3, 20, 6]

CLASSES = ("bad", "good", "neither")


def save_tiny_bert(folder, *, seed=0, classes=CLASSES, **overrides):
    """A small random BERT that classifies.

    Its WordPiece tokenizer over `WORDS` joins pairs as BERT does.
    """
    config = BertConfig(
        **{
            "vocab_size": 32,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 48,
            "initializer_range": 0.4,
            "id2label": dict(enumerate(classes)),
            "label2id": {name: index for index, name in enumerate(classes)},
        }
        | overrides
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        BertForSequenceClassification(config).save_pretrained(folder)
    vocab = {
        token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])
    }
    longest = config.max_position_embeddings
    BertTokenizerFast(vocab=vocab, model_max_length=longest).save_pretrained(folder)
    return folder
