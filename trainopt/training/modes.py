"""The modes of optimizers that train on other weights than those that are to be used (schedule-free methods)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from trainopt.training.average import kept
from trainopt.training.gradients import parameters


class Modes:
    """`optimizer.train()` and `optimizer.eval()`, where there are such methods; else nothing.

    A schedule-free optimizer's gradient is taken at one point and its result is another; the two methods move the
    parameters from one to the other, and back but for a rounding. So that no validation and no checkpoint has a part in
    what is trained, the parameters are put back to the bit.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.exist = all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))
        self.weights: list[Tensor] | None = None  # those trained on, while the model holds those to be used

    def train(self, weights: list[Tensor] | None = None) -> None:
        """Training mode; `weights`, if they are given, are those that a checkpoint has kept."""
        if not self.exist:
            return
        self.optimizer.train()  # type: ignore[attr-defined]
        if weights is not None:
            with torch.no_grad():
                for param, value in zip(parameters(self.optimizer), weights, strict=True):
                    param.copy_(value)

    def eval(self) -> None:
        """Evaluation mode: the model holds the weights to be used."""
        if self.exist:
            self.optimizer.eval()  # type: ignore[attr-defined]

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Evaluation mode inside; afterwards the parameters have the bits that they had."""
        if not self.exist or self.weights is not None:
            yield
            return
        params = parameters(self.optimizer)
        with kept(params):
            self.weights = [param.detach().clone() for param in params]
            self.optimizer.eval()  # type: ignore[attr-defined]
            try:
                yield
            finally:
                self.optimizer.train()  # type: ignore[attr-defined]
                self.weights = None
