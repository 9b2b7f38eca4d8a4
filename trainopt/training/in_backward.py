"""Steps within the backward pass of a run, where that is asked for (`trainopt.step_in_backward`)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from trainopt.optim.release import StepInBackward, step_in_backward
from trainopt.training.criterion.counting import Count, is_counted
from trainopt.training.state import State


class InBackward:
    """Has what is trained stepped within backward, from `begin` to `end`.

    Nothing can be taken back once backward has begun. So it is the loss that must be finite, and count something.

    Args:
        state: of the run.
        must_check: whether an update is left out if it is not finite.

    Raises:
        TypeError, ValueError: where that cannot be.
    """

    def __init__(self, state: State, must_check: bool) -> None:
        self.trained, self.optimizer, self.must_check = state.trained, state.optimizer, must_check
        self.is_finite = True  # the loss of the update at hand
        if state.processes.world > 1 or self.trained.wrappers():
            raise ValueError(
                "step_in_backward is True, but the gradients are averaged over processes after they are there: train in"
                " one process, or leave step_in_backward out"
            )
        self._steps: StepInBackward | None = step_in_backward(self.trained, self.optimizer)
        self.end()

    def begin(self) -> None:
        """From now on backward steps."""
        self._steps = step_in_backward(self.trained, self.optimizer)

    def end(self) -> None:
        """From now on it does not."""
        if self._steps is not None:
            self._steps.remove()
        self._steps = None

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Inside, backward does not step: for what is computed again."""
        self.end()
        yield
        self.begin()

    def may_begin(self, loss: Tensor, count: Count) -> bool:
        """Whether there is to be a backward pass. Waits for the device, unless nothing is to be checked."""
        self.is_finite = not self.must_check or math.isfinite(loss.detach())
        return self.is_finite and is_counted(count)
