"""A made-up teacher behind the scripted endpoint: a byte-level tokenizer, and its tokens.

It says something of its tokens in each form. Its distribution at a place is a softmax over the
whole vocabulary that follows from the tokens before, so a test knows all of it.
"""

import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from endpoint_server import answer_to
from kit import prompts

VOCABULARY = 300
END = 2
Form = Literal["ids", "bytes", "strings"]
"""vLLM's ids; bytes as OpenAI gives them; strings of tokens decoded alone, where a part of a
character is U+FFFD."""


@cache
def byte_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = [row["prompt"] + answer_to(row["prompt"]) for row in prompts(20)]
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )


def save_byte_tokenizer(folder: Path) -> Path:
    """In place of the one that a model's folder has."""
    for file in folder.glob("*token*"):
        file.unlink()
    byte_tokenizer().save_pretrained(folder)
    return folder


def tokens_of(prompt: str, text: str, *, ended: bool = True) -> tuple[list[int], list[int]]:
    """Ids of prompt and answer, tokenized as one."""
    tokenizer = byte_tokenizer()
    own = tokenizer(prompt)["input_ids"]
    ids = tokenizer(prompt + text)["input_ids"][len(own) :]
    return own, ids + ([END] if ended else [])


def teacher_says(before: Sequence[int]) -> np.ndarray:
    """[V] float64 log-probabilities of what follows some tokens.

    They are much the same everywhere, so they can be learnt.
    """
    seed = zlib.crc32(np.array(before, np.int32).tobytes())
    logits = np.random.default_rng(0).normal(0.0, 2.0, VOCABULARY)
    logits += np.random.default_rng(seed).normal(0.0, 0.5, VOCABULARY)
    found: np.ndarray = logits - np.log(np.exp(logits).sum())
    return found


def said_of(body: dict[str, Any], prompt: str, text: str, *, form: Form) -> dict[str, Any]:
    """What a choice says of the tokens of an answer."""
    own, ids = tokens_of(prompt, text)
    k = body.get("top_logprobs", body["logprobs"])
    positions = []
    for n, token in enumerate(ids):
        says = teacher_says(own + ids[:n]).astype(np.float32)
        best = np.argsort(-says, kind="stable")[:k].tolist()
        positions.append((token, says, best))
    if "messages" in body:
        content = [
            entry(token, says, form)
            | {"top_logprobs": [entry(other, says, form) for other in best]}
            for token, says, best in positions
        ]
        choice: dict[str, Any] = {"logprobs": {"content": content}}
    else:
        choice = {
            "logprobs": {
                "tokens": [name(token, form) for token, _, _ in positions],
                "token_logprobs": [float(says[token]) for token, says, _ in positions],
                "top_logprobs": [
                    {name(other, form): float(says[other]) for other in [token, *best]}
                    for token, says, best in positions
                ],
            }
        }
    if form == "ids":
        choice |= {"token_ids": ids, "prompt_token_ids": own}
    return choice | {"usage": {"prompt_tokens": len(own), "completion_tokens": len(ids)}}


def name(token: int, form: Form) -> str:
    return f"token_id:{token}" if form == "ids" else str(byte_tokenizer().decode([token]))


def entry(token: int, says: np.ndarray, form: Form) -> dict[str, Any]:
    found: dict[str, Any] = {"token": name(token, form), "logprob": float(says[token])}
    return found | ({"bytes": list(bytes_of(token))} if form == "bytes" else {"bytes": None})


def bytes_of(token: int) -> bytes:
    """By the pre-tokenizer's own alphabet, found out of what it makes of each byte."""
    tokenizer = byte_tokenizer()
    piece = tokenizer.convert_ids_to_tokens(token)
    if token <= 3:
        return str(piece).encode()
    return bytes(_alphabet()[one] for one in piece)


@cache
def _alphabet() -> dict[str, int]:
    """Bytes that stand for themselves are those of Latin 1 that print.

    The others follow 255 in their order.
    """
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(b): b for b in printing} | {chr(256 + n): b for n, b in enumerate(others)}
