"""How a training run ended."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

#: How a process should end after a run that ended for this reason; 1 for any other.
STATUS = {"finished": 0, "early stopping": 0, "SIGINT": 130, "SIGTERM": 143}


@dataclass(frozen=True)
class Result:
    """How a run ended. The model holds the weights of its last update; with `early_stopping`, the best ones."""

    step: int  # updates made in the whole run
    epoch: int  # passes over the data completed
    reason: str  # as in `Finished`
    loss: float  # mean over the last interval
    best: float | None  # the best value of `monitor`
    best_step: int | None
    checkpoint: Path | None  # the newest
    average: dict[str, Tensor] | None  # the moving average of the weights, for model.load_state_dict
    suspects: list[Any] | None  # the micro-batches of the last update that was left out as not finite
    criterion_average: dict[str, Tensor] | None = None  # that of what the loss owns, for loss.load_state_dict

    @property
    def is_complete(self) -> bool:
        """Whether the run came to its end: not by a signal, and not because nothing was finite any more."""
        return self.exit_status == 0

    @property
    def exit_status(self) -> int:
        """What the program should exit with: 0, 130 after SIGINT, 143 after SIGTERM, 1 where nothing was finite."""
        return STATUS.get(self.reason, 1)
