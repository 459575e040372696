"""Models whose numbers for a text depend on the longest text of its pass.

Their texts never share one.

Rotary embeddings of type `dynamic` and `longrope` choose their frequencies by the longest position
of a pass. So a text that is short enough for the first frequencies gets others beside a longer one.
The right answer is that for the text alone, by a model that has read nothing before.

Which types do so is in a table, with the length from which on they do. Whatever the type, the model
itself is asked too, at the lengths that there are.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ....storage.errors import in_short
from ..device import evaluating
from ..head import hidden_states

Read = Callable[[Sequence[int]], list[Tensor]]
"""What a model says of made-up texts of these lengths in one pass: [n, D] each, no padding."""


def changes_beyond(config: Any) -> int | None:
    """Tokens beyond which the frequencies depend on the longest position of a pass.

    None: they never do.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    # One for all layers, or one by name for each kind of layer.
    kinds = [rope] if "rope_type" in rope else [part for part in rope.values() if part]
    found = []
    for kind in kinds:
        if "dynamic" in kind["rope_type"]:
            found.append(text.max_position_embeddings)
        elif kind["rope_type"] == "longrope":
            found.append(kind["original_max_position_embeddings"])
    return min(found, default=None)


def forget_lengths(model: nn.Module) -> None:
    """Let a model's frequencies depend on no pass before.

    transformers' dynamic frequencies grow with the longest text and come back only for one that is
    shorter than the original context.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
        if hasattr(module, "max_seq_len_cached") and any("dynamic" in str(k) for k in kinds):
            module.register_forward_pre_hook(_forget)


def _forget(module: Any, _: Any) -> None:
    for name in [name for name, _ in module.named_buffers() if name.endswith("original_inv_freq")]:
        kind, original = name.removesuffix("original_inv_freq"), getattr(module, name)
        now = getattr(module, f"{kind}inv_freq")
        setattr(module, f"{kind}inv_freq", original.to(now.device))
        setattr(module, f"{kind}max_seq_len_cached", module.original_max_seq_len)


class Company:
    """Which texts may share a pass of a model.

    All may, unless the model says something else of one beside others.
    """

    def __init__(self, model: Any, read: Read | None = None) -> None:
        """`read` gives what the model says.

        None: it gives hidden states of a language model, padded at the end.
        """
        self._model = model
        self._read = read or (lambda lengths: states_together(model, lengths))
        self._tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
        limit = changes_beyond(model.config)
        self._parted = float("inf") if limit is None else limit + 1
        self._alike: range | None = None
        self.apart = "the longest text of a pass changes what is said of the others"
        """Why some texts share no pass, for messages."""

    def may_share(self, lengths: Iterable[int]) -> bool:
        """Whether texts of these lengths may share a pass.

        The model is asked where it was not asked yet.
        """
        shortest, longest = extremes(lengths)
        if shortest == longest:
            return True
        if longest >= self._parted:
            return False
        known = self._alike
        if known is not None and shortest in known and longest in known:
            return True
        if known is not None:
            shortest, longest = min(shortest, known[0]), max(longest, known[-1])
        if not self._same(shortest, longest):
            self._parted = longest
            return False
        self._alike = range(shortest, longest + 1)
        return True

    def _same(self, shortest: int, longest: int) -> bool:
        """Whether the shortest text, the longest and one in between are read the same together.

        These are on both sides of whatever length counts.
        """
        lengths = sorted({shortest, max(shortest, longest // 2), longest})
        try:
            with evaluating(self._model), torch.no_grad():
                alone = [self._read([n])[0] for n in lengths]
                together = self._read(lengths)
        except Exception as error:  # what cannot be read together is read alone
            self.apart = (
                f"texts of {shortest} and {longest} tokens could not be read together "
                f"({in_short(error)})"
            )
            return False
        return all(
            _off(found, right) <= self._tolerance
            for found, right in zip(together, alone, strict=True)
        )


def extremes(lengths: Iterable[int]) -> tuple[int, int]:
    """The shortest and the longest."""
    found = list(lengths)
    return min(found), max(found)


def _off(found: Tensor, right: Tensor) -> float:
    """Relative error of a position, the median.

    Experts that are chosen by a last bit move a few positions.
    """
    found, right = found.float(), right.float()
    errors: Tensor = (found - right).norm(dim=-1) / right.norm(dim=-1).clamp_min(1e-30)
    return float(errors.median())


def made_up(lengths: Sequence[int], vocab_size: int) -> list[Tensor]:
    """Token ids [n] of texts; token n is the same in all of them."""
    return [(torch.arange(n) * 7 + 1) % vocab_size for n in lengths]


def states_together(model: Any, lengths: Sequence[int]) -> list[Tensor]:
    """Hidden states [n, D] of made-up texts in one pass, padded at the end and masked.

    Teachers read texts so.
    """
    texts = made_up(lengths, model.get_input_embeddings().num_embeddings)
    ids, mask = torch.zeros(2, len(texts), max(lengths), dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    device = next(model.parameters()).device
    hidden = hidden_states(model, input_ids=ids.to(device), attention_mask=mask.to(device))
    return [states[:n] for states, n in zip(hidden, lengths, strict=True)]
