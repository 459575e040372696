"""Attention that a student cannot match, as far as the configs say it."""

from pathlib import Path

from ...stages.models.attention.by_config import AttentionFacts, attention_facts
from ...stages.models.fit.config import loaded_config
from ...stages.models.fit.files import read_json
from ...stages.models.fit.light import light_transformers
from ...stages.recipe.features import FeatureLoss
from ...storage.errors import UsageError

REMEDY = "Use other features (hidden), or a model whose attention is that alone."


def config_attention(folder: Path, field: str) -> AttentionFacts:
    """What the config in a folder says."""
    with light_transformers():
        config = loaded_config(read_json(folder / "config.json", field), where=f"{field}: {folder}")
        return attention_facts(config)


def refuse_unpaired(
    path: str, asked: FeatureLoss, teacher: AttentionFacts | None, student: AttentionFacts
) -> None:
    """Refuse what cannot be compared.

    Args:
        path: Of the entry, for messages.
        asked: An entry of `loss.features` that compares what attention multiplies.
        teacher: None: it is not here.
        student: Heads that are 0 are not said by the config.

    Raises:
        UsageError: heads that cannot be paired, a width that cannot be cut, a student that sees
            less.
    """
    if student.beyond is not None:
        raise UsageError(
            f"{path}: the student's attention is not softmax(scale q k^T) alone: it has "
            f"{student.beyond}. {REMEDY}"
        )
    if asked.relation_heads is not None:
        for who, facts in (("teacher", teacher), ("student", student)):
            _refuse_uncut(path, asked, who, facts)
        return
    if teacher is None:
        return
    said = teacher.heads and student.heads
    if asked.heads == "each" and said and teacher.heads != student.heads:
        raise UsageError(
            f"{path}.heads: each pairs head with head, but the teacher has {teacher.heads} and the "
            f"student {student.heads}. Use heads: average, or match: relations, which works with "
            "any number of heads."
        )
    if student.causal and not teacher.causal:
        raise UsageError(
            f"{path}: the teacher sees all tokens, the student those up to its own: KL is infinite "
            "where the teacher looks at what the student cannot see. Use match: relations."
        )


def _refuse_uncut(path: str, asked: FeatureLoss, who: str, facts: AttentionFacts | None) -> None:
    assert asked.relation_heads is not None
    for kind in asked.of:
        numbers = facts.numbers(kind) if facts is not None else 0
        if numbers % asked.relation_heads:
            raise UsageError(
                f"{path}.relation_heads: {numbers} numbers of the {who}'s {kind} cannot be cut "
                f"into {asked.relation_heads} parts. Choose one that divides {numbers}."
            )
