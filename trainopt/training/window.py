"""The micro-batches of one update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trainopt.training.criterion.counting import Count, is_counted, samples_in, weight_of, widest
from trainopt.training.data import MicroBatch
from trainopt.training.distributed import Processes


@dataclass
class Window:
    """The micro-batches of one update, all drawn before the first is computed: only then is it known how much each
    weighs. That also makes the gradient right in the last, shorter window of an epoch.

    What a loss counts may be known only once it is computed. The weights are then those of an estimate, each corrected
    for its own micro-batch, and `correction` is what the sum of the gradients still has to be multiplied by.

    A process that stops in the middle saves the window with the gradients so far.
    """

    batches: list[Any]
    planned: list[Count]  # what the loss counts in each, in this process, as far as it is known beforehand
    weights: list[float | Tensor]  # of each mean loss, in the sum whose gradient is the update's
    samples: int  # of all processes
    is_empty: bool  # whether the loss counts nothing in it, in any process, as far as that is known without waiting
    is_alone: bool = False  # one micro-batch in one process: whatever it counts, its gradient is the update's
    counts: list[Count] = field(default_factory=list)  # what the loss counted in those done
    asked: str = ""  # what any process has asked for after this update: "stop", "save", or both
    done: int = 0
    losses: list[Tensor] = field(default_factory=list)  # of those done, on the device
    buffers: list[Tensor] | None = None  # of what is trained, as they were before the first

    @classmethod
    def of(cls, drawn: list[MicroBatch], planned: Callable[[Any], Count]) -> Window:
        """Those of this process alone; `planned` says what the loss counts in a batch."""
        batches, counts, samples = [], [], 0
        for batch, counts_at_all in drawn:
            batches.append(batch)
            counts.append(planned(batch) if counts_at_all else 0)
            samples += samples_in(batch) if counts_at_all else 0
        total: Count = sum(counts)
        weights: list[float | Tensor] = [1.0] if len(counts) == 1 else [weight_of(each, total) for each in counts]
        is_empty = not isinstance(total, Tensor) and total == 0
        return cls(batches, counts, weights, samples, is_empty, is_alone=len(counts) == 1)

    def all_reduce(self, processes: Processes, asks: str) -> None:
        """Weighs the micro-batches among those of all processes, and learns what each process asks for.

        Collective: every process must call it.

        The gradients will be averaged over the processes: hence their number in the weights.
        """
        counts = [float(count) for count in self.planned]
        asking = [float("stop" in asks), float("save" in asks)]
        total, samples, stops, saves = processes.sum([sum(counts), self.samples, *asking])
        self.planned, self.weights = [*counts], [weight_of(count, total) * processes.world for count in counts]
        self.samples, self.is_empty, self.is_alone = int(samples), total == 0, False
        self.asked = " ".join(word for word, number in (("stop", stops), ("save", saves)) if number)

    def take(self, loss: Tensor, count: Count | None) -> None:
        """Takes in the next micro-batch's loss and what it counted, None for what was planned."""
        self.losses.append(loss.detach())
        self.counts.append(self.planned[self.done] if count is None else count)

    def weight_of(self, index: int) -> float | Tensor:
        """The weight of a mean loss that has been taken in."""
        weight, planned, counted = self.weights[index], self.planned[index], self.counts[index]
        if self.is_alone or counted is planned:
            return weight
        return weight * (counted / planned) if is_counted(planned) else 0.0

    def correction(self, processes: Processes) -> Count | None:
        """What the gradients must be multiplied by: what was planned over what was counted; None where nothing was
        counted. Collective."""
        if self.is_alone:
            return 1.0 if is_counted(self.counts[0]) else None
        planned: Count = sum(self.planned)
        counted: Count = sum(self.counts)
        if processes.world > 1:  # every process knows the sum of what was planned; each its own counts
            planned, counted = processes.sum([float(planned), float(counted)])
        if isinstance(counted, Tensor):
            return torch.where(counted > 0, planned / counted, 0.0)
        return planned / counted if counted else None

    def state_dict(self) -> dict[str, Any]:
        return {**vars(self), "losses": [float(loss) for loss in self.losses]}

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> Window:
        losses = [torch.tensor(loss, dtype=widest(device), device=device) for loss in state["losses"]]
        buffers = [buffer.to(device) for buffer in state["buffers"] or ()]
        return cls(**{**state, "losses": losses, "buffers": buffers, "asked": ""})
