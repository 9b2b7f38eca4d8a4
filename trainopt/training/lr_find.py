"""The learning-rate range test (Smith 2017, https://arxiv.org/abs/1506.01186, section 3.3).

The learning rate grows from update to update by a constant factor while the loss is noted. Where it falls fastest is a
good rate to start from; where it has its lowest value is already too high.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainopt.training import random_state
from trainopt.training.data import Source, move, source_of
from trainopt.training.distributed import Processes
from trainopt.training.precision import Precision
from trainopt.training.trained import Trained

SMOOTHING = 0.9  # of the moving mean over the losses
BLOWN_UP = 4.0  # times the lowest smoothed loss: the test ends


@dataclass(frozen=True)
class LrCurve:
    """What the range test found."""

    rates: list[float]  # of the first parameter group, one an update
    losses: list[float]  # before that update
    smoothed: list[float]  # exponential moving mean of the losses, debiased
    suggestion: float | None  # where the smoothed loss falls fastest; None where it never falls
    at_minimum: float  # where the smoothed loss is lowest

    def __str__(self) -> str:
        tried = f"{len(self.rates)} updates, from {self.rates[0]:.1e} to {self.rates[-1]:.1e}"
        if self.suggestion is None:
            return f"no learning rate suggested: the loss did not fall in {tried}"
        lowest = f"is lowest at {self.at_minimum:.1e}"
        return f"learning rate {self.suggestion:.1e}: the loss falls fastest there, and {lowest} ({tried})"


def lr_find(
    model: nn.Module,
    data: Any,
    loss: Callable[[Any, Any], Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    lowest: float = 1e-7,
    highest: float = 10.0,
    steps: int = 100,
    batch_size: int | str | None = None,
    precision: str = "float32",
    seed: int = 0,
    split: Callable[[Any], tuple[Any, Any]] | None = None,
) -> LrCurve:
    """The range test on copies of the model and the optimizer: what is given is left as it is, to the bit, and so are
    the random generators.

    Args:
        model, data, loss, optimizer, batch_size, precision, seed, split: as of `fit`. The groups' learning rates keep
            their proportions.
        lowest, highest: the first and the last learning rate of the first group.
        steps: updates from one to the other. The test ends early where the loss has grown to 4 times its lowest value.
    """
    if not 0 < lowest < highest < math.inf:
        raise ValueError(
            f"lowest is {lowest!r} and highest {highest!r}; they must be positive, and the first the smaller"
        )
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:
        raise ValueError(f"steps is {steps!r}; it must be a whole number of at least 2")
    device = next(model.parameters()).device
    source = source_of(data, batch_size, True, Processes(0, 1, device))
    state = [saved.clone() for saved in source.state()]
    try:
        with random_state.preserved(seed, device):
            task, optimizer = copy.deepcopy((Trained(model, loss, optimizer, split=split), optimizer))
            task.begin()
            if hasattr(optimizer, "train"):  # schedule-free methods have modes
                optimizer.train()
            rates, losses = _sweep(
                task.called,
                optimizer,
                _endless(source, seed),
                task,
                Precision(precision, device),
                (lowest, highest),
                steps,
            )
    finally:
        source.load(state)
    return curve_of(rates, losses)


def _sweep(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Any],
    task: Trained,
    precision: Precision,
    limits: tuple[float, float],
    steps: int,
) -> tuple[list[float], list[float]]:
    lowest, highest = limits
    first = float(optimizer.param_groups[0]["lr"])
    shares = [float(group["lr"]) / first if first else 1.0 for group in optimizer.param_groups]
    rates: list[float] = []
    losses: list[float] = []
    mean = weight = 0.0
    best = math.inf
    for i, batch in zip(range(steps), batches, strict=False):
        rate = lowest * (highest / lowest) ** (i / (steps - 1))
        for group, share in zip(optimizer.param_groups, shares, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate * share)
            else:
                group["lr"] = rate * share
        inputs, target = task.split(move(batch, precision.device))
        optimizer.zero_grad()
        with precision.autocast():
            value = task.loss(task.output(model, inputs), target)
        precision.scaled(value).backward()
        number = value.item()
        if not math.isfinite(number):
            break
        rates.append(rate)
        losses.append(number)
        mean, weight = SMOOTHING * mean + (1 - SMOOTHING) * number, SMOOTHING * weight + (1 - SMOOTHING)
        best = min(best, mean / weight)
        if mean / weight > best + (BLOWN_UP - 1) * abs(best):
            break
        if precision.scaler is None:
            optimizer.step()
        else:
            precision.scaler.step(optimizer)
            precision.scaler.update()
    if not rates:
        raise ValueError("the loss is not finite before the first update: the learning rate has no part in that")
    return rates, losses


def _endless(source: Source, seed: int) -> Iterator[Any]:
    for epoch in itertools.count():
        for micro_batch in source.epoch(seed, epoch, 0):
            yield micro_batch.batch


def curve_of(rates: list[float], losses: list[float]) -> LrCurve:
    """The curve through the losses at these rates, smoothed, with its steepest and its lowest point."""
    smoothed: list[float] = []
    mean = 0.0
    for i, loss in enumerate(losses, 1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        smoothed.append(mean / (1 - SMOOTHING**i))
    lowest = min(range(len(smoothed)), key=smoothed.__getitem__)
    slopes = {
        i: (smoothed[i + 1] - smoothed[i - 1]) / math.log(rates[i + 1] / rates[i - 1])
        for i in range(1, len(rates) - 1)
        if i <= lowest
    }
    steepest = min(slopes, key=slopes.__getitem__, default=None)
    falls = steepest is not None and slopes[steepest] < 0
    return LrCurve(rates, losses, smoothed, rates[steepest] if falls and steepest is not None else None, rates[lowest])
