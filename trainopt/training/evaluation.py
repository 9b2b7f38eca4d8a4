"""The mean loss and metrics of a model over data, without a trace on the model or the random generators."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from trainopt.training import random_state
from trainopt.training.counting import Count, add_weighted, samples_in, widest
from trainopt.training.data import Source, move
from trainopt.training.distributed import Processes, is_sharded
from trainopt.training.precision import Precision
from trainopt.training.trained import Trained


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
