"""To add a target kind: the ids of at least p times the best one's probability, k at most. Three files."""

EDITS = {
    "storage/tables/kinds.py": {
        # What its rows consist of.
        '    "full": Structure(': """\
    "minp": Structure(columns=("entries", "ids", "logprobs", "tail_logprob", "p")),
""",
    },
    "stages/recipe/kinds.py": {
        # What a recipe can say of it, its words for people, and what serves it.
        '    "full": TargetKind(': """\
    "minp": TargetKind(
        settings=("p", "k"),
        needs={"p": "keeps ids of at least p times the best one's probability. Try 0.1"},
        words="minp, at least {p} times the best one's probability, at most {k} entries",
        kept="minp, {p:g} of the best",
        covers={"k": ">=", "p": "<="},
        bytes_per_entry=2.6,
        bytes_per_token=8,
    ),
""",
    },
    "stages/targets/best_entries.py": {
        # How many of the best entries it keeps.
        "ENTRIES:": '''\
def minp(mass: Any, kept: Kept) -> Any:
    """As many as have at least p times the probability of the best, which always stays."""
    others = mass[:, 1:] - mass[:, :-1]
    return (others >= kept.p * mass[:, :1]).sum(-1) + 1


''',
        '    "topp": topp,\n': """\
    "minp": minp,
""",
    },
}
