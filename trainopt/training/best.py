"""The best validation so far, and early stopping."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


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
        self.weights: dict[str, Tensor] | None = None

    def offer(self, value: float, step: int, model: nn.Module) -> bool:
        """Takes in a validation of the model as it is; whether it is the best. NaN never is."""
        is_better = value == value and (
            self.value is None or (value > self.value if self.maximize else value < self.value)
        )
        if not is_better:
            self.since += 1
            return False
        self.value, self.step, self.since = value, step, 0
        if self.keeps_weights:
            self.weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "step": self.step, "since": self.since, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
