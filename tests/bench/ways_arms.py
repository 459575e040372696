"""The ways to distil that are compared.

It says what each arm learns from, and what of its teacher it has stored.

All arms of a task have one base (`Task.recipe`), one store, and the same teacher, rows and order.
An arm changes the loss, and where it begins with the teacher's layers the student's shape too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LABELS = {"soft_weight": 0.0, "hard_weight": 1.0}
LOGITS = {"divergence": "forward_kl", "temperature": 2.0, "soft_weight": 0.5, "hard_weight": 0.5}
KL = {"divergence": "forward_kl", "soft_weight": 1.0, "hard_weight": 0.1}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way."""

    says: str
    """What the student learns from, for people."""
    loss: Mapping[str, Any]
    """Section `loss`, without features."""
    match: Mapping[str, Any] | None = None
    """The entry of `loss.features`; its weight is the one that the match's authors use, or 1."""
    stored: tuple[Mapping[str, Any], ...] = ()
    """What `score.features` stores for it."""
    student: Mapping[str, Any] | None = None
    """Section `student`, where it is not the task's."""
    against: str
    """The arm that has the same but for what this one adds."""

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the recipe."""
        loss = dict(self.loss) | ({"features": [dict(self.match)]} if self.match else {})
        return {"loss": loss} | ({"student": dict(self.student)} if self.student else {})


@dataclass(frozen=True, kw_only=True)
class Task:
    """A teacher, rows, and the arms that are compared on them."""

    name: str
    arms: Mapping[str, Arm]
    base: str
    """The arm that all others are compared with."""
    measures: Mapping[str, str]
    """Measure -> heading; the first one decides, and chooses on validation."""
    better: int
    """1: more of the first measure is better; -1: less."""
    recipe: Mapping[str, Any]
    """Sections that all arms have."""
    held_out: Mapping[str, Mapping[str, Any]]
    """Split that judges -> section `evaluate`."""


def _stored(what: str, last: int, **more: Any) -> dict[str, Any]:
    return {"what": what, "layers": [last], **more}


def classify_arms(last: int, *, narrow: Mapping[str, Any]) -> dict[str, Arm]:
    """The arms of a classifier.

    Args:
        last: The teacher's last block; every feature is of it.
        narrow: What the config of a student of one of the teacher's layers changes beside their
            number.
    """
    cls = _stored("pooled", last, pooling="cls")
    group = {"pooling": "cls", "group": 32}
    one_layer = {"num_hidden_layers": 1, **narrow}
    return {
        "labels": Arm(says="gold labels alone", loss=LABELS, against="logits"),
        "logits": Arm(says="labels and the teacher's distribution", loss=LOGITS, against="labels"),
        "hidden": Arm(
            says="logits, and the last block's states",
            loss=LOGITS,
            match={"match": "hidden", "weight": 1.0},
            stored=(_stored("hidden", last),),
            against="logits",
        ),
        "attention": Arm(
            says="logits, and where the last block's heads look",
            loss=LOGITS,
            match={"match": "attention", "weight": 1.0},
            stored=(_stored("queries", last), _stored("keys", last)),
            against="logits",
        ),
        "values": Arm(
            says="logits, and relations of the last block's values",
            loss=LOGITS,
            match={"match": "relations", "of": ["values"], "relation_heads": 4, "weight": 1.0},
            stored=(_stored("values", last),),
            against="logits",
        ),
        "rkd": Arm(
            says="labels and how texts lie to one another (distance and angle), no distribution",
            loss=LABELS,
            match={"match": "rkd", **group, "weight": 25.0},
            stored=(cls,),
            against="labels",
        ),
        "infonce": Arm(
            says="logits, and which text of 32 is which",
            loss=LOGITS,
            match={"match": "infonce", **group, "weight": 1.0},
            stored=(cls,),
            against="logits",
        ),
        "embedding": Arm(
            says="logits, and the teacher's token embeddings",
            loss=LOGITS,
            match={"match": "embeddings", "weight": 1.0},
            stored=({"what": "embeddings"},),
            against="logits",
        ),
        "layers": Arm(
            says="logits, begun as the teacher's first layer, embeddings and head",
            loss=LOGITS,
            student={"from_teacher_layers": [0], "config": dict(narrow)},
            against="one layer",
        ),
        "one layer": Arm(
            says="logits, fresh weights in that student's shape",
            loss=LOGITS,
            student={"config": one_layer},
            against="logits",
        ),
    }


def causal_arms(last: int) -> dict[str, Arm]:
    """The arms of a language model, with `last` as above."""
    return {
        "text": Arm(says="the text alone: cross-entropy", loss=LABELS, against="logits"),
        "logits": Arm(
            says="the teacher's 16 likeliest tokens, and the text", loss=KL, against="text"
        ),
        "hidden": Arm(
            says="logits, and the last block's states",
            loss=KL,
            match={"match": "hidden", "weight": 1.0},
            stored=(_stored("hidden", last),),
            against="logits",
        ),
        "values": Arm(
            says="logits, and relations of the last block's values",
            loss=KL,
            match={"match": "relations", "of": ["values"], "relation_heads": 4, "weight": 1.0},
            stored=(_stored("values", last),),
            against="logits",
        ),
    }
