"""The kinds of soft targets as they are stored: one row each.

What recipes say of them is in `stages/recipe/kinds.py`.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Structure:
    """What the rows of one kind consist of."""

    columns: tuple[str, ...]
    """What entries and settings are written in, beside the columns that all kinds have."""
    weighted: tuple[str, ...] | None = None
    """The same where draws are weighed, which is where `proposal` is not 1."""
    whole: bool = False
    """Every id is an entry, in the order of the ids: no tail, every temperature."""
    drawn: bool = False
    """Entries are draws: no tail and no order, an estimate at one temperature."""
    may_lack: bool = False
    """Whether a position may have fewer than `k` entries; a row that has such a one says how many
    each has in `entries`, as a ragged kind does, and of another one that column is null."""
    holds_mass: bool = False
    """A position has the fewest entries, within `k_min` and `k`, that hold a mass of `p`."""

    @property
    def has_tail(self) -> bool:
        """Whether it is the best entries and the mass of all other ids."""
        return not (self.whole or self.drawn)

    @property
    def ragged(self) -> bool:
        """Whether positions differ in how many entries they have."""
        return "entries" in self.columns

    @property
    def most_temperatures(self) -> float:
        """How many temperatures beside 1 a row may be stored at."""
        if self.whole:
            return 0
        return 1 if self.drawn else float("inf")

    def columns_of(self, proposal: float | None) -> tuple[str, ...]:
        """Those of a row with this `proposal`."""
        return self.columns if self.weighted is None or proposal == 1.0 else self.weighted


STRUCTURES = {
    "topk": Structure(columns=("ids", "logprobs", "tail_logprob"), may_lack=True),
    "topp": Structure(
        columns=("entries", "ids", "logprobs", "tail_logprob", "p", "k_min"),
        holds_mass=True,
    ),
    "sampled": Structure(
        columns=("entries", "ids", "counts", "draw", "proposal"),
        weighted=("entries", "ids", "weights", "draw", "proposal"),
        drawn=True,
    ),
    "full": Structure(columns=("logprobs", "tail_logprob"), whole=True),
}
