"""The micro-batches of one update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trainopt.training.counting import Count, samples_in, weight_of, widest
from trainopt.training.data import MicroBatch
from trainopt.training.distributed import Processes


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
    def of(cls, drawn: list[MicroBatch], count: Callable[[Any], Count]) -> Window:
        """Those of this process alone; `count` says what the loss counts in a batch."""
        batches, counts, samples = [], [], 0
        for batch, counts_at_all in drawn:
            batches.append(batch)
            counts.append(count(batch) if counts_at_all else 0)
            samples += samples_in(batch) if counts_at_all else 0
        total: Count = sum(counts)
        weights: list[float | Tensor] = [1.0] if len(counts) == 1 else [weight_of(each, total) for each in counts]
        return cls(batches, counts, weights, samples, not isinstance(total, Tensor) and total == 0)

    def share(self, processes: Processes, asks_to_stop: bool) -> None:
        """Weighs the micro-batches among those of all processes. Collective: every process must call it.

        The gradients will be averaged over the processes: hence their number in the weights.
        """
        counts = [float(count) for count in self.counts]
        total, samples, asking = processes.sum([sum(counts), self.samples, float(asks_to_stop)])
        self.counts, self.weights = [*counts], [weight_of(count, total) * processes.world for count in counts]
        self.samples, self.is_empty, self.asked_to_stop = int(samples), total == 0, asking > 0

    def state_dict(self) -> dict[str, Any]:
        return {**vars(self), "losses": [float(loss) for loss in self.losses]}

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> Window:
        losses = [torch.tensor(loss, dtype=widest(device), device=device) for loss in state["losses"]]
        buffers = [buffer.to(device) for buffer in state["buffers"] or ()]
        return cls(**{**state, "losses": losses, "buffers": buffers, "asked_to_stop": False})
