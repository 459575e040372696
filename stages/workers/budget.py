"""What the answers of an endpoint may cost.

Each call is admitted at the most that it can be charged.

So the limit is not passed, whatever comes back. Calls in flight at a death, and those that came to
nothing without a word from the endpoint, may have been charged: they count in full. A connection
that was never made is no call.

The budget is that of a run folder, and of an endpoint's model; only one process at a time spends
it. That it was reached is written down there under a hash of its limits: the same command then asks
for nothing, and other limits are another budget.
"""

import threading
from pathlib import Path

from ...storage.files.local import LocalFiles
from ...storage.keys import content_id
from ..recipe.engines import Generate
from .answers import Answers, Tokens

_LIMITS = (
    "max_usd",
    "max_tokens_total",
    "usd_per_million_prompt_tokens",
    "usd_per_million_completion_tokens",
    "max_tokens",
)


def usd(generate: Generate, tokens: Tokens) -> float | None:
    """What tokens cost; None: the recipe names no prices."""
    prompt, completion = (
        generate.usd_per_million_prompt_tokens,
        generate.usd_per_million_completion_tokens,
    )
    if prompt is None or completion is None:
        return None
    return (tokens.prompt * prompt + tokens.completion * completion) / 1e6


def limited(generate: Generate) -> bool:
    """Whether there is a budget at all."""
    return generate.max_usd is not None or generate.max_tokens_total is not None


class Budget:
    """The budget of one process's calls; threads may ask it."""

    def __init__(self, generate: Generate, answers: Answers) -> None:
        self._generate, self._answers = generate, answers
        self._lock = threading.Lock()

    def admits(self, key: str, most: Tokens) -> bool:
        """Whether there is enough for a call that may be charged so much.

        Then the call is noted as sent.
        """
        with self._lock:
            spent = self._answers.charged.plus(self._answers.in_doubt)
            if not self._within(spent.plus(most)):
                return False
            self._answers.asked(key, most)
            return True

    def _within(self, tokens: Tokens) -> bool:
        most_tokens, most_usd = self._generate.max_tokens_total, self._generate.max_usd
        if most_tokens is not None and sum(tokens) > most_tokens:
            return False
        cost = usd(self._generate, tokens)
        return most_usd is None or cost is None or cost <= most_usd


def note_reached(folder: Path, generate: Generate) -> None:
    """Write down that nothing more can be asked for within these limits."""
    LocalFiles(folder).put_if_absent(_mark(generate), b"")


def is_reached(folder: Path, generate: Generate) -> bool:
    """Whether that was written down."""
    return (folder / _mark(generate)).is_file()


def _mark(generate: Generate) -> str:
    return f"reached-{content_id('budget', **{name: getattr(generate, name) for name in _LIMITS})}"
