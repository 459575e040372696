"""Scalars of a training run, over positions fed: on TensorBoard, and where it was asked for on W&B."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .trainer import Losses, StepResult
    from .wandb_board import WandbBoard


class Board:
    """TensorBoard scalars over tokens; what a run wrote after the checkpoint it goes on from is purged."""

    def __init__(self, folder: Path, tokens: int, *, beside: "WandbBoard | None" = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._beside = beside
        self._writer = SummaryWriter(folder, purge_step=tokens + 1)

    def __enter__(self) -> "Board":
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()
        if self._beside is not None:
            self._beside.close()

    def write(self, tokens: int, scalars: dict[str, float]) -> None:
        """Name -> value, as of this many positions fed."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, global_step=tokens)
        if self._beside is not None:
            self._beside.write(tokens, scalars)


def step_scalars(result: "StepResult") -> dict[str, float]:
    """What is shown of a step."""
    rates = {"learning_rate": result.learning_rate, "grad_norm": result.grad_norm}
    return loss_scalars("loss", result.losses) | rates | result.scheduled


def loss_scalars(prefix: str, losses: "Losses") -> dict[str, float]:
    """Losses that were computed, as `<prefix>/total`, `soft`, `hard`."""
    values = {"total": losses.loss, "soft": losses.soft, "hard": losses.hard}
    return {f"{prefix}/{name}": value for name, value in values.items() if value is not None}
