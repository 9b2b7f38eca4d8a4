"""The learning-rate range test (Smith 2017, https://arxiv.org/abs/1506.01186, section 3.3), and trials that settle it.

The learning rate grows from update to update by a constant factor while the loss is noted: that curve shows the range
in which a rate can lie. Its steepest point and its lowest one move with the number of updates, by a factor of 10 from
50 to 400, for in more updates more has been learned before the rate is high. So the suggestion does not come from it:
rates of 1 and 3 times the powers of ten are tried, each for the same few updates from the weights as they were given
and on the same batches, and the smallest is suggested that lowers the loss nearly as far as the best.
"""

from __future__ import annotations

import copy
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trainopt.training import random_state
from trainopt.training.data import Source, move, source_of
from trainopt.training.distributed import Processes
from trainopt.training.fields import whole
from trainopt.training.precision import Precision
from trainopt.training.trained import Trained
from trainopt.training.watch.first_nonfinite import uncompiled

SMOOTHED = 0.25  # decades of the learning rate that the curve is smoothed over
BLOWN_UP = 4.0  # times the lowest smoothed loss: the test ends
TRIAL, COUNTED = 24, 8  # updates in a trial, and those at its end whose losses are compared
NEARLY = 0.8  # of the best trial's fall
FRUITLESS = 3  # trials in a row, on the way down, that lower the loss less than half as far as the best


@dataclass(frozen=True)
class LrCurve:
    """What the range test found."""

    rates: list[float]  # of the first parameter group, one an update
    losses: list[float]  # before that update
    smoothed: list[float]  # mean of the losses around
    suggestion: float | None  # the rate to begin with; None where none lowers the loss
    at_minimum: float  # where the smoothed loss is lowest
    falls: dict[float, float] = field(default_factory=dict)  # of each rate tried, by how much it lowers the loss

    def __str__(self) -> str:
        tried = f"{len(self.rates)} updates, from {self.rates[0]:.1e} to {self.rates[-1]:.1e}"
        if self.suggestion is None:
            return f"no learning rate suggested: the loss did not fall in {tried}, nor in trials of {TRIAL} updates"
        fall = self.falls[self.suggestion]
        return (
            f"learning rate {self.suggestion:.0e}: the loss falls fastest with it, or nearly, by {fall:.3g} in {TRIAL} "
            f"updates; while the rate grows it is lowest at {self.at_minimum:.1e} ({tried})"
        )

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """The curve and the suggestion as a figure of matplotlib, which a notebook shows.

        Args:
            path: a file that it is drawn into as well.

        Raises:
            ImportError: matplotlib is not installed (``pip install 'trainopt[plot]'``).
        """
        from trainopt.training.folder import figure

        picture = figure((8, 5))
        axes = picture.subplots()
        axes.plot(self.rates, self.losses, alpha=0.3, label="loss")
        axes.plot(self.rates, self.smoothed, label="smoothed")
        if self.suggestion is not None:
            axes.axvline(self.suggestion, linestyle="--", color="gray", label=f"suggestion {self.suggestion:.0e}")
        axes.set_xscale("log")
        axes.set_xlabel("learning rate")
        axes.set_ylabel("loss")
        axes.legend()
        axes.grid(alpha=0.3)
        if path is not None:
            picture.savefig(path, dpi=120)
        return picture


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
    """The range test and the trials, on copies of the model, the loss and the optimizer: what is given is left as it
    is, to the bit, and so are gradients and random generators. It takes `steps` updates, and about 200 for the trials.

    Args:
        model, data, loss, optimizer, batch_size, precision, seed, split: as of `fit`. The groups' learning rates keep
            their proportions.
        lowest, highest: the first and the last learning rate of the first group.
        steps: updates from one to the other: the points of the curve. The test ends early where the loss has grown to 4
            times its lowest value. The suggestion does not depend on them.

    Raises:
        ValueError: for limits or steps that cannot be, and where the loss is not finite whatever the rate is.
    """
    if not 0 < lowest < highest < math.inf:
        raise ValueError(
            f"lowest is {lowest!r} and highest {highest!r}; they must be positive, and the first the smaller"
        )
    whole(2).check("steps", steps)
    device = next(model.parameters()).device
    source = source_of(data, batch_size, True, Processes(0, 1, device))
    state = [saved.clone() for saved in source.state()]
    given = [param for group in optimizer.param_groups for param in group["params"]]
    gradients = [param.grad for param in given]
    try:
        with random_state.preserved(seed, device), uncompiled():  # each copy would be compiled anew
            test = _Test(model, loss, optimizer, split, Precision(precision, device))
            batches = list(itertools.islice(_endless(source, seed), TRIAL))
            falls = test.trials(batches, lowest, highest, seed)
            source.load(state)
            rates, losses = test.sweep(_endless(source, seed), lowest, highest, steps)
    finally:
        source.load(state)
        for param, gradient in zip(given, gradients, strict=True):  # of a loss's parameters that no copy could reach
            param.grad = gradient
    return curve_of(rates, losses, falls)


class _Test:
    """The objects given, of which every run makes a copy."""

    def __init__(self, model: Any, loss: Any, optimizer: Any, split: Any, precision: Precision) -> None:
        self.given, self.precision = (Trained(model, loss, optimizer, split=split), optimizer), precision
        first = float(optimizer.param_groups[0]["lr"])
        self.ratios = [float(group["lr"]) / first if first else 1.0 for group in optimizer.param_groups]

    def updates(self, batches: Iterable[Any], rates: Iterable[float]) -> Iterator[float]:
        """The loss before each update of a copy."""
        trained, optimizer = copy.deepcopy(self.given)
        trained.begin()
        if hasattr(optimizer, "train"):  # schedule-free methods have modes
            optimizer.train()
        precision = self.precision
        scaler = None if precision.scaler is None else torch.amp.GradScaler(precision.device.type)
        for batch, rate in zip(batches, rates, strict=False):
            for group, ratio in zip(optimizer.param_groups, self.ratios, strict=True):
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate * ratio)
                else:
                    group["lr"] = rate * ratio
            inputs, target = trained.split(move(batch, precision.device))
            optimizer.zero_grad()
            with precision.autocast():
                value = trained.loss(trained.output(trained.called, inputs), target)
            (value if scaler is None else scaler.scale(value)).backward()
            yield value.item()
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()

    def sweep(
        self, batches: Iterator[Any], lowest: float, highest: float, steps: int
    ) -> tuple[list[float], list[float]]:
        """Rates and losses while the rate grows."""
        growing = [lowest * (highest / lowest) ** (i / (steps - 1)) for i in range(steps)]
        losses: list[float] = []
        best, width = math.inf, width_of(growing)
        for loss in self.updates(batches, growing):
            if not math.isfinite(loss):
                break
            losses.append(loss)
            recent = mean(losses[-width:])
            best = min(best, recent)
            if recent > best + (BLOWN_UP - 1) * abs(best):
                break
        if not losses:
            raise ValueError("the loss is not finite before the first update: the learning rate has no part in that")
        return growing[: len(losses)], losses

    def trials(self, batches: list[Any], lowest: float, highest: float, seed: int) -> dict[float, float]:
        """By how much each rate lowers the loss, from the highest down; a rate that blows up is left out."""
        before = self.losses(batches, 0.0, seed, math.inf)
        if len(before) < len(batches):
            raise ValueError("the loss is not finite before the first update: the learning rate has no part in that")
        worst = max(before) + (BLOWN_UP - 1) * abs(max(before))
        falls: dict[float, float] = {}
        best, fruitless = 0.0, 0
        for rate in grid(lowest, highest):
            after = self.losses(batches, rate, seed, worst)
            if len(after) < len(before):
                continue
            gains = [a - b for a, b in zip(before[-COUNTED:], after[-COUNTED:], strict=True)]
            falls[rate] = mean(gains)
            best = max(best, falls[rate])
            fruitless = fruitless + 1 if falls[rate] < 0.5 * best else 0
            if fruitless == FRUITLESS:
                break
        return falls

    def losses(self, batches: list[Any], rate: float, seed: int, worst: float) -> list[float]:
        """The losses before each of a few updates at a rate; fewer where one is not finite or above `worst`. With a
        rate of 0 nothing is learned."""
        found: list[float] = []
        with random_state.preserved(seed, self.precision.device):
            for loss in self.updates(batches, itertools.repeat(rate)):
                if not math.isfinite(loss) or loss > worst:
                    break
                found.append(loss)
        return found


def grid(lowest: float, highest: float) -> Iterator[float]:
    """The rates 1 and 3 times a power of ten within the limits, from the highest down; `highest` if there is none."""
    rates = [float(f"{digit}e{power}") for power in range(-30, 31) for digit in (1, 3)]
    return reversed([rate for rate in rates if lowest <= rate <= highest] or [highest])


def _endless(source: Source, seed: int) -> Iterator[Any]:
    for epoch in itertools.count():
        for micro_batch in source.epoch(seed, epoch, 0):
            yield micro_batch.batch


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def width_of(rates: Sequence[float]) -> int:
    """How many points in a row the curve is smoothed over: at least 3, so that one batch is nothing."""
    decades = math.log10(rates[-1] / rates[0])
    return max(3, round(SMOOTHED * (len(rates) - 1) / decades)) if decades else 3


def curve_of(rates: list[float], losses: list[float], falls: dict[float, float] | None = None) -> LrCurve:
    """The curve through the losses at these rates, smoothed, with its lowest point; the suggestion from `falls`."""
    reach = width_of(rates) // 2
    smoothed = [mean(losses[max(0, i - reach) : i + reach + 1]) for i in range(len(losses))]
    lowest = min(range(len(smoothed)), key=smoothed.__getitem__)
    falls = falls or {}
    best = max(falls.values(), default=0.0)
    suggestion = (
        min((rate for rate, fall in falls.items() if fall >= NEARLY * best), default=None) if best > 0 else None
    )
    return LrCurve(rates, losses, smoothed, suggestion, rates[lowest], falls)
