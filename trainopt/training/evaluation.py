"""The mean loss and metrics of a model over data, without a trace on the model or the random generators."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trainopt.training import random_state
from trainopt.training.counting import Count, add_weighted, on_host, samples_in, widest
from trainopt.training.data import Source, move
from trainopt.training.distributed import Processes
from trainopt.training.precision import Precision


class Task:
    """What a batch is for the model and the loss.

    Args:
        loss: `loss(output, target)`, the mean over what it counts.
        count: how many that is, of a target.
        split: `(inputs, target)` of a batch.
    """

    def __init__(
        self,
        loss: Callable[[Any, Any], Tensor],
        count: Callable[[Any], Count],
        split: Callable[[Any], tuple[Any, Any]] | None,
    ) -> None:
        self.loss, self.split, self._count = loss, split or pair, count

    def count(self, batch: Any) -> Count:
        """What the loss counts in a batch; a number wherever that costs no waiting."""
        count = self._count(self.split(batch)[1])
        return on_host(count) if isinstance(count, Tensor) else count

    def output(self, model: nn.Module, inputs: Any) -> Any:
        """The model's output; a tuple or list of inputs are its arguments, a dict its keyword arguments."""
        if isinstance(inputs, (tuple, list)):
            return model(*inputs)
        if isinstance(inputs, dict):
            return model(**inputs)
        return model(inputs)


def pair(batch: Any) -> tuple[Any, Any]:
    """A batch that is (inputs, target) already; ValueError for another."""
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    size = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
    raise ValueError(f"a batch is a {type(batch).__name__}{size}, not (inputs, target): give split=")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradients; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def evaluate(
    model: nn.Module,
    source: Source,
    task: Task,
    metrics: Mapping[str, Callable[[Any, Any], Any]],
    precision: Precision,
    processes: Processes,
) -> dict[str, float]:
    """The mean loss, over what it counts, and the means of the metrics, over the samples, by name.

    Args:
        model: the bare module. Nothing is read from its device before the end.
    """
    device = processes.device
    total_loss = torch.zeros((), dtype=widest(device), device=device)
    totals = {name: torch.zeros((), dtype=widest(device), device=device) for name in metrics}
    counted: Count = 0
    samples = 0
    with evaluating(model), random_state.preserved(device=device):
        for micro_batch in source.epoch(seed=0, epoch=0, skip=0):
            if not micro_batch.counts:
                continue
            count = task.count(micro_batch.batch)
            inputs, target = task.split(move(micro_batch.batch, device))
            with precision.autocast():
                output = task.output(model, inputs)
                add_weighted(total_loss, task.loss(output, target), count)
            counted = counted + count
            size = samples_in(target)
            samples += size
            for name, metric in metrics.items():
                value = torch.as_tensor(metric(output, target), dtype=widest(device), device=device)
                totals[name] += value * size
    sums = processes.sum([float(counted), samples, float(total_loss), *(float(total) for total in totals.values())])
    return {
        "loss": sums[2] / sums[0] if sums[0] else float("nan"),
        **{name: total / sums[1] for name, total in zip(totals, sums[3:], strict=True)},
    }
