"""The findings of a public write-up, one by one.

Do they stand when each loss has a learning rate of its own?

The write-up (Qwen2.5-3B, fine-tuned, to Qwen2.5-0.5B with LoRA; 5,000 training and 1,000 test rows;
temperature 2; all at one learning rate) reported: teacher 81.1 %; forward KL alone 70.5 % after one
epoch and 73 % after two; with half cross-entropy 70.5 %; a fine-tuned student 80.3 %, and 61.9 %
when distilled from there; reverse KL 54 %; skew forward KL collapsed.

A finding is a difference of two students in accuracy on test rows, paired by seed. It is there if
the mean difference is `MARGIN` or more in its direction and every seed has that direction; "changes
nothing" is there below `MARGIN`.

    stands                         it is there at each student's own learning rate
    artefact of the learning rate  not there at their own rates, but at the common one, or at one
                                   of the grid
    not seen at this size          at none
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

MARGIN = 0.02
"""Points of accuracy, as a share. The write-up's differences are 2.5 points and more; the test
rows' own standard error is about 0.9 points for one student, less for two on the same rows."""
Student = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two students."""

    arm: str
    start: str = "fresh"
    epoch: int = 2
    """0: before it was distilled."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What the write-up found."""

    says: str
    claimed: str
    first: Side
    second: Side
    sign: int = -1
    """Of first minus second; 0: the two are alike."""


FINDINGS = (
    Finding(
        says="forward KL alone is worse than labels alone",
        claimed="73.0 against 80.3",
        first=Side(arm="forward_kl"),
        second=Side(arm="labels"),
    ),
    Finding(
        says="a second epoch of forward KL helps",
        claimed="70.5, then 73.0",
        first=Side(arm="forward_kl"),
        second=Side(arm="forward_kl", epoch=1),
        sign=1,
    ),
    Finding(
        says="half cross-entropy beside forward KL changes nothing",
        claimed="70.5 and 70.5",
        first=Side(arm="forward_kl+labels", epoch=1),
        second=Side(arm="forward_kl", epoch=1),
        sign=0,
    ),
    Finding(
        says="a fine-tuned student gets worse when it is distilled",
        claimed="80.3, then 61.9",
        first=Side(arm="forward_kl", start="fine-tuned", epoch=1),
        second=Side(arm="forward_kl", start="fine-tuned", epoch=0),
    ),
    Finding(
        says="reverse KL is far worse than forward KL",
        claimed="54.0 against 70.5",
        first=Side(arm="reverse_kl", epoch=1),
        second=Side(arm="forward_kl", epoch=1),
    ),
    Finding(
        says="skew forward KL collapses",
        claimed="collapsed, against 70.5",
        first=Side(arm="skew_forward_kl", epoch=1),
        second=Side(arm="forward_kl", epoch=1),
    ),
)


def accuracy(student: Student, epoch: int) -> float:
    """On test rows after an epoch, 0 before the first.

    A student whose training broke off guesses.
    """
    if epoch == 0:
        return float(student["before"]["test"]["accuracy"])
    return float(student["after"][epoch - 1]["test"]["accuracy"]) if student["after"] else 0.5


def verdicts(
    students: list[Student], *, best: dict[tuple[str, str], float], common: float, first_seed: int
) -> list[dict[str, Any]]:
    """Each finding with its differences, which are shares.

    They are at own rates, at the common rate and along the grid.

    Args:
        students: All that were trained.
        best: Learning rate of each arm and start.
        common: The one that all were trained at.
        first_seed: That of the grid.
    """
    at_first = [s for s in students if s["seed"] == first_seed]
    found = []
    for finding in FINDINGS:
        own = _differences(
            students, finding, [best.get(_name(side)) for side in (finding.first, finding.second)]
        )
        same = _differences(students, finding, [common, common])
        grid = {}
        for rate in sorted(
            {s["rate"] for s in at_first if (s["arm"], s["start"]) == _name(finding.first)}
        ):
            # The first student's rate moves; the second keeps its own, unless it is the same
            # student.
            alike = _name(finding.first) == _name(finding.second)
            pair = [rate, rate if alike else best.get(_name(finding.second))]
            if difference := _differences(at_first, finding, pair):
                grid[rate] = difference[0]
        found.append(
            {
                "says": finding.says,
                "claimed": finding.claimed,
                "own": own,
                "common": same,
                "grid": grid,
            }
            | {"verdict": _verdict(finding.sign, own, same, grid)}
        )
    return found


def _name(side: Side) -> tuple[str, str]:
    return side.arm, side.start


def _differences(
    students: Iterable[Student], finding: Finding, rates: Sequence[float | None]
) -> list[float]:
    """First minus second, for every seed that both have."""
    sides = []
    for side, rate in zip((finding.first, finding.second), rates, strict=True):
        mine = [s for s in students if (s["arm"], s["start"], s["rate"]) == (*_name(side), rate)]
        sides.append({s["seed"]: accuracy(s, side.epoch) for s in mine})
    return [sides[0][seed] - sides[1][seed] for seed in sorted(sides[0].keys() & sides[1].keys())]


def _verdict(sign: int, own: list[float], same: list[float], grid: dict[float, float]) -> str:
    if not own:
        return "not run"
    if _there(sign, own):
        return "stands"
    if _there(sign, same) or (
        sign and max(sign * difference for difference in grid.values()) >= MARGIN
    ):
        return "artefact of the learning rate"
    return "not seen at this size"


def _there(sign: int, differences: list[float]) -> bool:
    if not differences:
        return False
    if sign == 0:
        return abs(fmean(differences)) < MARGIN
    return sign * fmean(differences) >= MARGIN and all(
        sign * difference > 0 for difference in differences
    )
