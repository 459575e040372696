"""What the doctor found of one thing: ok, a warning or a fault."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

State = Literal["ok", "warning", "fault"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """A line."""

    name: str
    state: State
    """warning: runs work, more slowly or without a part. fault: a run is impossible."""
    found: str
    means: str = ""
    do: str = ""

    def json(self) -> dict[str, Any]:
        """It for programs."""
        return asdict(self)

    def line(self) -> str:
        """It for people, in one line."""
        said = [part.rstrip(".") for part in (self.found, self.means, self.do) if part]
        return f"{self.state:<8} {self.name:<18} {'. '.join(said)}."


def ok(name: str, found: str, means: str = "", do: str = "") -> Finding:
    """As it should be; `do` where more can be had."""
    return Finding(name=name, state="ok", found=found, means=means, do=do)


def warning(name: str, found: str, means: str, do: str) -> Finding:
    """Runs work, more slowly or without a part."""
    return Finding(name=name, state="warning", found=found, means=means, do=do)


def fault(name: str, found: str, means: str, do: str) -> Finding:
    """A run is impossible."""
    return Finding(name=name, state="fault", found=found, means=means, do=do)
