"""The best validation so far, and early stopping."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from trainopt.training.distributed import whole
from trainopt.training.trained import State, Trained


class Best:
    """The best value of what is monitored, and the weights that had it.

    Args:
        maximize: whether larger is better.
        keeps_weights: whether the weights are kept in memory and in the checkpoints.
    """

    def __init__(self, maximize: bool, keeps_weights: bool) -> None:
        self.maximize, self.keeps_weights = maximize, keeps_weights
        self.value: float | None = None
        self.step: int | None = None
        self.since = 0  # validations since then
        self.weights: dict[str, State] | None = None  # as `Trained.state` gives them

    def offer(self, value: float, step: int, trained: Trained) -> bool:
        """Takes in a validation of the weights as they are; whether it is the best. NaN never is."""
        is_better = value == value and (
            self.value is None or (value > self.value if self.maximize else value < self.value)
        )
        if not is_better:
            self.since += 1
            return False
        self.value, self.step, self.since = value, step, 0
        if self.keeps_weights:
            self.weights = copied(trained.state())
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "step": self.step, "since": self.since, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave; begins anew where the weights are to be kept and are not there, since they
        could not be brought back."""
        self.value, self.step, self.since = state["value"], state["step"], state["since"]
        self.weights = state["weights"] if self.keeps_weights else None
        if self.keeps_weights and self.weights is None:
            self.value, self.step, self.since = None, None, 0


def copied(state: dict[str, State]) -> dict[str, State]:
    """A copy of what `Trained.state` gave; of sharded tensors the whole, on every process."""
    return {
        part: {
            name: whole(value.detach()).clone() if isinstance(value, Tensor) else value for name, value in own.items()
        }
        for part, own in state.items()
    }
