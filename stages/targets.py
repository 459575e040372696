"""From hidden states to soft targets, a chunk of tokens at a time: [N, V] in float32 never exists whole.

Letters: N scored tokens, K entries, V vocabulary, D hidden.
"""

from typing import Any

import numpy as np
import torch

from ..storage.codec import SoftTargets
from .head import Head

CHUNK_BYTES = 64 * 2**20  # float32 logits held at once


def soft_targets(hidden: torch.Tensor, head: Head, next_ids: torch.Tensor, *, kind: str, k: int) -> SoftTargets:
    """The distribution of the next token at each position, kept sparsely.

    With z the logits, log p = z - logsumexp(z) over the full vocabulary, in float32. `topk` keeps the K best and the
    log of the mass of all others, a logsumexp over what is not kept (1 - sum of the kept would cancel).

    Args:
        hidden: [N, D] states at the predicting positions, after the final norm.
        head: The model's output head.
        next_ids: [N] the tokens that follow.
        kind: `topk`, or `full` for all V in id order.
        k: Entries per position (topk).

    Returns:
        ids [N, K], logprobs [N, K] descending, tail_logprob [N], token_logprob [N], entropy [N] in nats.
    """
    hidden, next_ids = (t.to(head.weight.device) for t in (hidden, next_ids))  # a spread model has it elsewhere
    chunk = max(1, CHUNK_BYTES // (4 * head.vocab_size))
    parts = [
        _chunk(head.logits(hidden[i : i + chunk]), next_ids[i : i + chunk], k if kind == "topk" else None)
        for i in range(0, hidden.shape[0], chunk)
    ]
    ids, *rest = zip(*parts, strict=True)
    logprobs, tail, token, entropy = (torch.cat(column).cpu().numpy() for column in rest)
    return SoftTargets(
        ids=torch.cat(ids).cpu().numpy().astype(np.int32) if kind == "topk" else None,
        logprobs=logprobs,
        tail_logprob=tail,
        token_logprob=token,
        entropy=entropy,
    )


def _chunk(logits: torch.Tensor, next_ids: torch.Tensor, k: int | None) -> tuple[Any, ...]:
    logprobs = logits.log_softmax(-1)
    token = logprobs.gather(-1, next_ids[:, None]).squeeze(-1)
    entropy = -(logprobs.exp() * logprobs).nan_to_num(0.0).sum(-1)  # a logit of -inf: 0 * -inf is 0 here
    if k is None:
        return None, logprobs, torch.full_like(token, -torch.inf), token, entropy
    kept, ids = logprobs.topk(k, dim=-1)
    tail = logprobs.scatter_(-1, ids, -torch.inf).logsumexp(-1)
    return ids, kept, tail, token, entropy
