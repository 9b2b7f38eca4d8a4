"""The micro-batches of one update."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trainopt.training.counting import Count, weight_of, widest


@dataclass
class Window:
    """The micro-batches of one update, all drawn before the first is computed: only then is it known how much each
    weighs. That also makes the gradient right in the last, shorter window of an epoch.

    A process that stops in the middle saves the window with the gradients so far.
    """

    batches: list[Any]
    counts: list[Count]  # what the loss counts in each, in this process
    weights: list[float | Tensor]  # of each mean loss, in the sum whose gradient is the update's
    samples: int  # of all processes
    is_empty: bool  # whether the loss counts nothing in it, in any process, as far as that is known without waiting
    asked_to_stop: bool = False  # by a signal in any process
    done: int = 0
    losses: list[Tensor] = field(default_factory=list)  # of those done, on the device
    buffers: list[Tensor] | None = None  # the model's, as they were before the first

    @classmethod
    def of(
        cls, batches: list[Any], counts: list[Count], total: Count, samples: int, world: int, stop: bool = False
    ) -> Window:
        """`total` is counted over all processes, whose gradients will be averaged: hence `world` in the weights."""
        is_empty = not isinstance(total, Tensor) and total == 0
        weights: list[float | Tensor] = [1.0]
        if len(batches) > 1 or world > 1:
            weights = [weight_of(count, total) * world for count in counts]
        return cls(batches, counts, weights, samples, is_empty, stop)

    def state_dict(self) -> dict[str, Any]:
        return {**vars(self), "losses": [float(loss) for loss in self.losses]}

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> Window:
        losses = [torch.tensor(loss, dtype=widest(device), device=device) for loss in state["losses"]]
        buffers = [buffer.to(device) for buffer in state["buffers"] or ()]
        return cls(**{**state, "losses": losses, "buffers": buffers, "asked_to_stop": False})
