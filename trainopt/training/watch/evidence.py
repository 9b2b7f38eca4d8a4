"""A few updates, measured: how far they move the weights, which units they leave out, and what longer ones would do."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trainopt.training import random_state
from trainopt.training.data import move
from trainopt.training.precision import Precision
from trainopt.training.trained import Trained

MEASURED, TRIED = 8, 4  # updates whose sum is measured; updates after them whose batches it is tried on
LONGEST = 10**6  # times an update, in the search along it
SAMPLES, UPDATES = 256, 8  # in which a dead unit has had no gradient
RESOLVED = 1e-5  # of a loss: less is rounding
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Evidence:
    """What was measured; NaN and nothing where the run ended before."""

    level: float = math.nan  # mean of the losses while it was measured
    gradient: float = math.nan  # norm of the last gradient
    weights: float = math.nan  # norm of the weights before the last update
    update: float = math.nan  # norm of their change in it
    losses: dict[float, float] = field(default_factory=dict)  # of other batches, by how many updates more were made
    jump: float = 0.0  # the change of that loss if the last update were made once more

    @property
    def ratio(self) -> float:
        """The change against the weights; infinite where the weights are all zero."""
        return self.update / self.weights if self.weights else math.inf

    @property
    def best(self) -> float:
        """How many more updates of the same kind would have lowered the loss most; NaN where that was not tried."""
        return min(self.losses, key=lambda times: self.losses[times]) if len(self.losses) > 1 else math.nan


class Measurement:
    """Measures the updates from the next one on; `evidence` is there when `is_done`.

    Args:
        searches: whether the loss is looked at along the updates. Their mean over a few batches is the direction and
            the batches after them are what it is tried on: the same batch can always be fitted better.
    """

    def __init__(self, searches: bool) -> None:
        self.searches, self.is_done = searches, False
        self.evidence = Evidence()
        self._updates = 0
        self._first: list[Tensor] | None = None  # the weights before the first update; then the change by a mean one
        self._last: list[Tensor] = []  # before the last
        self._batches: list[Any] = []
        self._losses: list[Tensor] = []

    @torch.no_grad()
    def before_step(self, params: Sequence[Tensor]) -> None:
        if self._updates == 0 and self.searches:
            self._first = [param.clone() for param in params]
        if self._updates == (MEASURED + TRIED - 1 if self.searches else 0):
            self._last = [param.clone() for param in params]

    @torch.no_grad()
    def after_step(
        self,
        params: Sequence[Tensor],
        batch: Any,
        loss: Tensor,
        gradient: float,
        trained: Trained,
        precision: Precision,
    ) -> None:
        """Takes in an update.

        Args:
            params: as the update left them.
            batch, loss: of its last micro-batch.
            gradient: norm of its gradient.
            trained, precision: what the loss is computed by, where it is looked at along the updates.
        """
        self._updates += 1
        self._losses.append(loss)
        if self.searches and self._updates == MEASURED:
            self._first = difference(params, self._first or (), MEASURED)
        if self._updates > MEASURED:
            self._batches.append(batch)
        if self._updates < (MEASURED + TRIED if self.searches else 1):
            return
        self.is_done = True
        weights = math.hypot(*(float(old.norm()) for old in self._last))
        last = difference(params, self._last)
        update = math.hypot(*(float(change.norm()) for change in last))
        losses: dict[float, float] = {}
        jump = 0.0
        if self.searches and update:
            buffers = list(trained.buffers())
            kept = [buffer.clone() for buffer in buffers]
            with random_state.preserved(device=precision.device):
                loss_now = loss_of(self._batches, trained, precision)
                losses, jump = search(params, self._first or (), last, loss_now)
            for buffer, old in zip(buffers, kept, strict=True):
                buffer.copy_(old)
        level = float(torch.stack(self._losses).float().mean())
        self.evidence = Evidence(level, gradient, weights, update, losses, jump)


def difference(new: Sequence[Tensor], old: Sequence[Tensor], parts: int = 1) -> list[Tensor]:
    """(new - old) / parts, in the place of `old`."""
    return [b.sub_(a).div_(-parts) for a, b in zip(new, old, strict=True)]


def search(
    params: Sequence[Tensor], mean: Sequence[Tensor], last: Sequence[Tensor], loss: Callable[[], float]
) -> tuple[dict[float, float], float]:
    """The loss with the mean update made 0, 1, 10, 100, … times more, as long as it falls; and by how much it changes
    with the last update made once more. The parameters are as before afterwards, to the bit.

    What goes wrong in here (no memory for a copy, a model that refuses) must not end a training: nothing is found then.
    """

    def loss_after(change: Sequence[Tensor], times: float) -> float:
        for param, old, part in zip(params, kept, change, strict=True):
            param.copy_(old.add(part, alpha=times))
        return loss()

    kept: list[Tensor] = []
    try:
        kept += [param.clone() for param in params]
        losses = {0.0: loss()}
        jump = loss_after(last, 1) - losses[0.0]
        times = 1.0
        while times <= LONGEST:
            losses[times] = loss_after(mean, times)
            lowest = min(losses.values())
            if not losses[times] <= lowest + RESOLVED * abs(lowest):
                break
            times *= 10
    except Exception:
        return {}, 0.0
    finally:
        for param, old in zip(params, kept, strict=len(kept) > 0):
            param.copy_(old)
    return {times: loss for times, loss in losses.items() if math.isfinite(loss)}, jump


def loss_of(batches: Sequence[Any], trained: Trained, precision: Precision) -> Callable[[], float]:
    """What gives the mean loss of some batches, each time with the same random numbers."""
    moved = [trained.split(move(batch, precision.device)) for batch in batches]

    def forward(inputs: Any, target: Any) -> Tensor:
        return trained.loss(trained.output(trained.model, inputs), target)

    def loss() -> float:
        torch.manual_seed(0)
        return sum(float(precision.run(forward, *parts)) for parts in moved) / len(moved)

    return loss


class Units:
    """Which units of which layers have had a gradient, in the updates looked at."""

    def __init__(self) -> None:
        self.alive: dict[str, Tensor] = {}
        self.updates = self.samples = 0

    @torch.no_grad()
    def see(self, module: nn.Module, samples: int) -> None:
        """Takes in the gradients of an update. Nothing is read from the device."""
        self.updates += 1
        self.samples += samples
        for name, layer in module.named_modules():
            weight = layer._parameters.get("weight") if isinstance(layer, LAYERS) else None
            grad = None if weight is None else weight.grad
            if grad is not None and type(grad) is Tensor and grad.layout == torch.strided and grad.numel():
                alive = grad.flatten(1).abs().amax(1) != 0  # a third of the time that `any` takes
                self.alive[name] = self.alive[name] | alive if name in self.alive else alive

    @property
    def are_enough(self) -> bool:
        """Whether a unit without a gradient in all of it is dead, and not only seldom used."""
        return self.samples >= SAMPLES and self.updates >= UPDATES

    def counts(self) -> dict[str, tuple[int, int]]:
        """Of each layer, its units without a gradient, and all. Waits for the device."""
        return {name: (len(alive) - int(alive.sum()), len(alive)) for name, alive in self.alive.items()}
