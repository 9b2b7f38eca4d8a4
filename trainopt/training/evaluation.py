"""Validation: the mean loss and metrics over data, and the best so far.

An evaluation leaves no trace on the model or the random generators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trainopt.training import random_state
from trainopt.training.criterion.counting import Count, add_weighted, samples_in, widest
from trainopt.training.data import Source, move
from trainopt.training.distributed import Processes, is_sharded, whole
from trainopt.training.precision import Precision
from trainopt.training.trained import StateDict, Trained


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradients; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def evaluate(
    trained: Trained,
    source: Source,
    metrics: Mapping[str, Callable[[Any, Any], Any]],
    precision: Precision,
    processes: Processes,
) -> dict[str, float]:
    """The mean loss, over what it counts, and the means of the metrics, over the samples, by name; NaN where there are
    none.

    Nothing is read from the device before the end.
    """
    device = processes.device
    total_loss = torch.zeros((), dtype=widest(device), device=device)
    totals = {name: torch.zeros((), dtype=widest(device), device=device) for name in metrics}
    counted: Count = 0
    samples = 0
    must_take_part = processes.world > 1 and is_sharded(trained.model)  # its forward pass waits for all processes
    with evaluating(trained), random_state.preserved(device=device):
        for micro_batch in source.epoch(seed=0, epoch=0, skip=0):
            if not micro_batch.counts and not must_take_part:
                continue
            planned = trained.planned(micro_batch.batch)
            inputs, target = trained.split(move(micro_batch.batch, device))
            with precision.autocast():
                output, loss, count = trained.measured(inputs, target)
            if not micro_batch.counts:
                continue
            count = planned if count is None else count
            add_weighted(total_loss, loss, count)
            counted = counted + count
            size = samples_in(target)
            samples += size
            for name, metric in metrics.items():
                value = torch.as_tensor(metric(output, target), dtype=widest(device), device=device)
                totals[name] += value * size
    sums = processes.sum([float(counted), samples, float(total_loss), *(float(total) for total in totals.values())])
    return {
        "loss": sums[2] / sums[0] if sums[0] else float("nan"),
        **{name: total / sums[1] if sums[1] else float("nan") for name, total in zip(totals, sums[3:], strict=True)},
    }


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
        self.weights: dict[str, StateDict] | None = None  # as `Trained.state` gives them

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


def copied(state: dict[str, StateDict]) -> dict[str, StateDict]:
    """A copy of what `Trained.state` gave; of sharded tensors the whole, on every process."""
    return {
        part: {
            name: whole(value.detach()).clone() if isinstance(value, Tensor) else value for name, value in own.items()
        }
        for part, own in state.items()
    }
