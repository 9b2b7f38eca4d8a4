"""Three troubles of training, said with numbers: the loss does not fall, it rises, or validation parts from it.

The watch reads only what has been brought from the device to be shown. When the loss gives it cause, it asks for one
update to be measured (`Evidence`) and then says what it takes the reason to be.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainopt.training.report import Message

INTERVALS = 6  # Progress events that a judgement is made from
LEAST_FALL = 0.02  # of the first interval's loss, within those
RISE = 1.5  # times the lowest loss: it rises
TOO_SMALL, USUAL, TOO_LARGE = 1e-5, 1e-3, 3e-2  # the size of an update against the weights'
DEAD_SHARE = 0.9  # of a layer's units without a gradient
PARTING, PATIENCE = 0.01, 3  # validation above its best by this share, this many times in a row

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Evidence:
    """One update, measured."""

    gradient: float  # norm of the gradient
    weights: float  # norm of the weights before
    update: float  # norm of their change
    dead_layer: str | None  # the layer with the largest share of units without a gradient
    dead: int  # how many
    units: int  # of how many

    @property
    def ratio(self) -> float:
        """The change against the weights; infinite where the weights are all zero."""
        return self.update / self.weights if self.weights else math.inf


def measure(model: nn.Module, before: Iterable[Tensor], params: list[Tensor], gradient: float) -> Evidence:
    """The evidence of an update just made, whose gradients are still there, from a copy of the parameters before it."""
    before = list(before)
    with torch.no_grad():
        weights = math.hypot(*(float(old.norm()) for old in before))
        update = math.hypot(*(float((new - old).norm()) for new, old in zip(params, before, strict=True)))
        worst: tuple[float, str | None, int, int] = (0.0, None, 0, 0)
        for name, module in model.named_modules():
            grad = module.weight.grad if isinstance(module, LAYERS) else None
            if grad is not None and grad.layout == torch.strided and grad.numel():
                units = len(grad)
                dead = units - int(grad.flatten(1).any(dim=1).sum())
                if dead / units > worst[0]:
                    worst = (dead / units, name, dead, units)
    return Evidence(gradient, weights, update, *worst[1:])


class Watch:
    """Follows the losses of a run and says once, with numbers, what is wrong with them."""

    def __init__(self) -> None:
        self.first: float | None = None
        self.recent: deque[float] = deque(maxlen=INTERVALS // 2)
        self.intervals = 0
        self.lowest, self.lowest_step = math.inf, 0
        self.cause: str | None = None  # "flat" or "rising": an update is to be measured
        self.told: list[str] = []
        self.best_validation, self.best_step, self.train_at_best = math.inf, 0, math.nan
        self.apart = 0

    def progressed(self, step: int, loss: float) -> None:
        """Takes in the mean loss of an interval. Afterwards `cause` says whether an update should be measured."""
        if not math.isfinite(loss):
            return
        self.intervals += 1
        self.first = loss if self.first is None else self.first
        self.recent.append(loss)
        if loss < self.lowest:
            self.lowest, self.lowest_step = loss, step
        if self.intervals >= INTERVALS and self.cause is None:
            now = sum(self.recent) / len(self.recent)
            scale = abs(self.first)
            if (
                "rising" not in self.told
                and now > self.lowest + (RISE - 1) * abs(self.lowest)
                and now > self.first - LEAST_FALL * scale
            ):
                self.cause = "rising"
            elif "flat" not in self.told and self.intervals == INTERVALS and now > self.first - LEAST_FALL * scale:
                self.cause = "flat"

    def measured(self, step: int, evidence: Evidence, lr: float) -> Message:
        """What the measured update says about the cause."""
        now = sum(self.recent) / len(self.recent)
        if self.cause == "rising":
            fact = f"the loss rose from {self.lowest:.4g} at step {self.lowest_step:,} to {now:.4g}"
        else:
            fact = f"the loss does not fall: {self.first:.4g} at first, {now:.4g} now"
        ratio = evidence.ratio
        moves = f"an update changes the weights by {ratio:.2g} of their size"
        dead = evidence.dead / evidence.units if evidence.units else 0.0
        usual = f"{lr * USUAL / ratio:.0e}" if 0 < ratio < math.inf else None
        if evidence.gradient == 0:
            why = "every gradient is zero: does the loss depend on the model's output, and are its units all off?"
        elif dead >= DEAD_SHARE:
            why = (
                f"{evidence.dead:,} of {evidence.units:,} units of layer '{evidence.dead_layer}' get no gradient: dead "
                "units; try a lower learning rate from the start, another initialisation, or a leaky activation"
            )
        elif ratio > TOO_LARGE or self.cause == "rising":
            advice = f"try {usual}" if usual and ratio > USUAL else f"try {lr / 10:.0e}"
            why = f"the learning rate {lr:.3g} seems too high: {moves}; {advice}, a warm-up, or clip"
        elif ratio < TOO_SMALL:
            why = f"the learning rate {lr:.3g} seems too low: {moves}" + (f"; try {usual}" if usual else "")
        else:
            why = (
                f"{moves}, the gradient's norm is {evidence.gradient:.2g}: nothing is wrong with their size; look at "
                "the inputs' scale and the labels, and try lr-find"
            )
        self.told.append(str(self.cause))
        self.cause = None
        numbers = {
            "loss": now,
            "lr": lr,
            "gradient": evidence.gradient,
            "update_to_weights": ratio,
            "dead_units": float(evidence.dead),
        }
        return Message(step, "trouble", "loss", f"{fact}; {why}", numbers)

    def validated(self, step: int, loss: float, train_loss: float) -> Message | None:
        """Takes in a validation; a message when it has parted from the training loss."""
        if loss < self.best_validation:
            self.best_validation, self.best_step, self.train_at_best, self.apart = loss, step, train_loss, 0
            return None
        falls = train_loss < self.train_at_best
        above = loss > self.best_validation + PARTING * abs(self.best_validation)
        self.apart = self.apart + 1 if falls and above else 0
        if self.apart < PATIENCE or "overfitting" in self.told:
            return None
        self.told.append("overfitting")
        text = (
            f"validation parts from training: since step {self.best_step:,} its loss rose from "
            f"{self.best_validation:.4g} to {loss:.4g}, while the training loss fell from {self.train_at_best:.4g} to "
            f"{train_loss:.4g}; try more data or augmentation, weight decay, dropout, a smaller model, early_stopping"
        )
        numbers = {"validation": loss, "best_validation": self.best_validation, "training": train_loss}
        return Message(step, "trouble", "overfitting", text, numbers)

    def state_dict(self) -> dict[str, Any]:
        """All that is remembered, as plain numbers, strings and lists."""
        return {**vars(self), "recent": list(self.recent), "told": list(self.told)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        vars(self).update(state)
        self.recent = deque(state["recent"], maxlen=INTERVALS // 2)
        self.told = list(state["told"])
