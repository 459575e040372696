"""To add a divergence: Renyi's, of an order that the recipe chooses. Two files."""

EDITS = {
    "stages/recipe/divergences.py": {
        # The row: what all who ask about divergences are told.
        "}\n\nif TYPE_CHECKING:": """\
    "renyi": DivergenceKind(
        equation="1/(a - 1) log sum_i t_i^a p_i^(1 - a), a = renyi_order",
        source="Renyi 1961",
        parameters=("renyi_order",),
        finite_without_tail=always,
    ),
""",
        # Its parameter: a key of the recipe's `loss`, with default, bounds and words.
        '    @field_validator("alpha_beta")\n': '''\
    renyi_order: float = Field(0.5, gt=0, lt=1)
    """renyi: exponent of the teacher."""

''',
    },
    "stages/losses/divergences.py": {
        # The function, found by the row's name; parameters arrive by theirs.
        "def _kl(": '''\
def renyi(teacher: Tensor, student: Tensor, *, renyi_order: float) -> Tensor:
    """1/(a - 1) log sum_i t_i^a p_i^(1 - a), a = renyi_order."""
    terms = renyi_order * teacher + (1 - renyi_order) * _above_zero(student)
    return terms.logsumexp(-1) / (renyi_order - 1)


''',
    },
}
