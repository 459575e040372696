"""All advice that there is, one line each: what was found, why it matters, and the one thing to do.

The functions of this room look at the numbers. What they find is filled into these lines, and every
threshold stands here with its reason.
"""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

ENOUGH_MASS = 0.9
"""Below it more than a tenth of the teacher is told as one number per token, or not at all: at 0.84
kept a student got 86 % of what the whole distribution teaches, at 0.68 54 %
(tests/bench/results/targets)."""
MOST_DEGREES = 45.0
"""The cosine of 45 degrees is 0.71: beyond it less than 71 % of a step goes where the whole
distribution leads."""
FAST_FALL = 0.03
"""From one tenth of the training to the next: so falls a loss that goes as tokens to the power
-0.27, which loses 17 % with twice the tokens."""
MOST_PASSES = 4
"""Over the text: so often it is worth nearly as much as new text (Muennighoff et al. 2023, arXiv
2305.16264). After more, a loss also falls because the text is known by heart."""
SPIKE = 10.0
"""Times the median of the norms around it. Batches differ by a factor of two or three; clipping
takes the length of a step, and not its direction, back."""
RISE = 0.1
"""Above the loss of the first step, once the learning rate has warmed up: noise of batches is
smaller, and a student should by then be better than it began."""
NO_MOVE = 0.01
"""Of the loss of the first steps, in the first quarter of the training, and of the distance to the
teacher in all of it: what falls less may as well be noise."""
MOST_REJECTED = 0.01
"""Of the rows of a stage: more is rarely chance, and what is missing is of one kind (the long ones,
say)."""
LARGEST_RATE = 1e-2
"""Of what is advised: above it Adam's steps undo one another, and more of them are asked for."""
CLEAR = 2.0
"""Standard errors from which on a difference is told from none (95 of 100 times)."""
RESOLVED = 0.05
"""Of the baseline's distance to the teacher: a smaller difference is rarely worth a training, a
larger one should be seen."""
LEAST_POINTS = 30
"""Of a curve: with fewer nothing is said of its ends."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Advice:
    """A judgement of a number."""

    name: str
    """Its line of `RULES`."""
    about: str
    """The stage or arm that it is about."""
    found: str
    reason: str
    do: str

    def json(self) -> dict[str, str]:
        """It for programs."""
        return asdict(self)

    def line(self) -> str:
        """It for people, in one line."""
        return f"advice: {self.about}: {self.found}. {self.reason}. {self.do}."


class Rule(NamedTuple):
    """A line of the table; numbers come in place of the words in braces."""

    found: str
    reason: str
    do: str


RULES = {
    "kept_mass": Rule(
        "{entries} {mass} of this teacher{measured_on}",
        "Of what is outside them a student learns the sum alone, if that",
        "Set {remedy}",
    ),
    "rejects": Rule(
        "{rejected} of {rows} rows were rejected ({share}): {why}",
        "What is left out is rarely a random part, and the student never sees it",
        "Mend the records or the limit that is named, and run again",
    ),
    "gradient_angle": Rule(
        "the gradient of the soft loss is {angle} degrees off that of the whole distribution, on "
        "{tokens} tokens",
        "From 45 degrees on less than 71 % of a step goes where the teacher leads; from 90 on none",
        "Set {remedy}",
    ),
    "still_falling": Rule(
        "in the last tenth of the training the loss was {loss}, {fall} below that of the tenth "
        "before",
        "It had not come to rest: more of the same training brings more",
        "Set train.{length}",
    ),
    "gradient_norm": Rule(
        "the gradient's norm was {norm} after {tokens} tokens, {times}",
        "Such a step throws the optimizer's averages off, and the student with them",
        "Set train.learning_rate: {rate}, a third of what it was",
    ),
    "rate_too_high": Rule(
        "the loss rose from {first} to {loss} in the first {tokens} tokens",
        "Steps this large undo what the student could do before",
        "Set train.learning_rate: {rate}, a third of what it was",
    ),
    "rate_too_low": Rule(
        "the loss went from {first} to {loss} in the first {tokens} tokens, a quarter of the "
        "training",
        "Steps this small, or a student that has nothing left to learn, teach nothing",
        "Set train.learning_rate: {rate}, three times what it was",
    ),
    "learned_nothing": Rule(
        "KL to the teacher is {value} nats, and was {before} before the training",
        "Steps this small, or this few, teach nothing: fresh weights want larger ones than "
        "pretrained weights do",
        "Set train.{remedy}, ten times what it was",
    ),
    "worse": Rule(
        "{measure} is {gap} nats worse than that of {other} ({value} against {against}, standard "
        "error {error})",
        "What the targets add is less than what they take away",
        "Set {remedy}",
    ),
    "too_few_tokens": Rule(
        "on {tokens} held-out tokens a difference in {measure} to {other} shows from {visible} on, "
        "and it is {gap}",
        "So it is not known which of them is better: {visible} is {share} of what {other} is off",
        "Hold out {times} as much: {remedy}",
    ),
}
"""Every advice that there is, by name."""


def advice(name: str, about: str, **numbers: Any) -> Advice:
    """The line of a name, with its numbers."""
    found, reason, do = (part.format(**numbers) for part in RULES[name])
    return Advice(name=name, about=about, found=found, reason=reason, do=do)
