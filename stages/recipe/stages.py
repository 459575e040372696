"""The stages in their order: what each one reads and fills, and how many processes do it.

The processes are those of one machine. Plan, runner, worker and status ask this table.

To add a stage: a row here, its folder under `stages/` with a `run(job)` in `stage.py`, and its line
in `pipeline/plan/`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator

from ...storage.errors import UsageError
from .fields import Arm, Section
from .run_folder import EVALUATED, TRAINED

if TYPE_CHECKING:
    from ...storage.tables.schema import TableName

S = TypeVar("S")


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A line of the plan, and the process behind it."""

    name: str
    room: str
    """Its folder under `stages/`; `--only` and `--until` call it by this name."""
    table: "TableName | None" = None
    """The table of the store that it fills."""
    loads: Literal["author", "teacher"] | None = None
    """The model that its process runs; each row of such a stage may be rejected."""
    arm: Arm | None = None
    """The run variant that it trains."""
    meets: bool = False
    """Whether several processes do it together, each a rank, and not side by side."""
    record: str = ""
    """The file that it leaves in a student's folder when it is done."""


STAGES = (
    Stage(name="data", room="data", table="prompts"),
    Stage(name="generate", room="generate", table="generations", loads="author"),
    Stage(name="score", room="score", table="soft_targets", loads="teacher"),
    Stage(name="train", room="train", arm="student", meets=True, record=TRAINED),
    Stage(name="baseline", room="train", arm="baseline", meets=True, record=TRAINED),
    Stage(name="evaluate", room="evaluate", meets=True, record=EVALUATED),
)


MOST_WORKERS, MOST_PROCESSES = 100_000, 1024
"""Workers of a whole cluster, and processes that train together: more is a slip of the pen."""


def _to(most: int) -> BeforeValidator:
    def some(count: Any) -> Any:
        if count != "auto" and (type(count) is not int or not 1 <= count <= most):
            raise ValueError(f"must be auto, or a whole number from 1 to {most} (got {count!r})")
        return count

    return BeforeValidator(some)


class Compute(Section):
    """How much of this machine a run takes.

    It decides how fast, and nothing of what is made: it is in no hash.
    """

    workers: Annotated[int | Literal["auto"], _to(MOST_WORKERS)] = "auto"
    """Processes that write, and then score, side by side. auto: one for each GPU that is visible,
    or for each group of them where the engine needs several; without a GPU one."""
    processes: Annotated[int | Literal["auto"], _to(MOST_PROCESSES)] = "auto"
    """Processes that train a student together, and then judge it. auto: one for each GPU that is
    visible; without a GPU one."""
    sharding: Literal["auto", "ddp", "fsdp2"] = "auto"
    """How they hold it. ddp: each has all of it. fsdp2: each has a part of every weight. auto: ddp
    where the student fits on each device, else fsdp2."""


def stage_named(line: str) -> Stage:
    """The row of a line of the plan; of several teachers each has a line, `score/NAME`."""
    name, _, _ = line.partition("/")
    return next(stage for stage in STAGES if stage.name == name)


def file_name(line: str) -> str:
    """What the files are called that belong to a line of the plan."""
    return line.replace("/", "-")


def needed(section: S | None, name: str) -> S:
    """A section of the recipe that a stage, or a student, cannot do without.

    Raises:
        UsageError: the recipe has no such section.
    """
    if section is None:
        raise UsageError(
            f"{name}: missing, and a stage was asked for that needs it. Add the section, or leave "
            "the stage out."
        )
    return section
