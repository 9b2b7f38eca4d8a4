"""What the optimizer of a run does in its step, where it is one of trainopt's: it clips, leaves out and averages there.

With any other optimizer each of them is a pass of the loop's over all gradients or weights. The options are lent to the
optimizer's groups for the time of a step: whoever looks at these in between, a checkpoint, a schedule or a report,
finds them as the person made them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor

from trainopt.optim.base import Fused
from trainopt.optim.distributed import is_dtensor
from trainopt.optim.gradients import DEVICE_TYPES, clears, clips
from trainopt.optim.options import DEFAULTS, extra
from trainopt.optim.stats import ParameterStats
from trainopt.training.average import WeightAverage
from trainopt.training.state import State


class Tail:
    """Decides, in one update after the other, what the optimizer does in its step.

    Args:
        state: of the run.
        must_check: whether an update is left out if its gradient is not finite.
    """

    def __init__(self, state: State, must_check: bool) -> None:
        self.state, self.options, self.must_check = state, state.options, must_check
        self.optimizer: Any = state.optimizer
        self.clips = False  # whether the step at hand finds the norm of all gradients, and clips by it
        self.skips = False  # whether it is left out if that norm is not finite
        self.averages = False  # whether it moves the average, from the first one of this process until `end`
        self.measures = False  # whether the step at hand tells the norms of gradient, weights and update
        self.gradient_norm = self.update_ratio = math.nan  # what it has told
        self._stepped: list[int] | None = None  # what had a gradient in the first one

    def prepare(self, params: list[Tensor], is_watched: bool, is_shown: bool) -> None:
        """Looks at a step that is about to be made.

        Args:
            params: the optimizer's, with their gradients.
            is_watched: whether the gradients are looked at before it, and must be known to be finite.
            is_shown: whether its numbers are reported.
        """
        self.gradient_norm = self.update_ratio = math.nan
        groups = self.optimizer.param_groups
        is_able = steps_alone(self.optimizer) and not self.options.step_in_backward
        self.clips = is_able and (self.options.clip is not None or all(map(clips, groups)))
        # Elsewhere stats are taken round a step of torch's, which differs from the engine's in its last bits.
        self.measures = is_shown and is_able and all(map(_is_on_engine, params))
        # All processes that share weights must look in the same way; and the watch sees none of their gradients.
        is_watched = is_watched and not self.state.is_sharded
        # A step that is left out clears what it would have cleared: nobody could say any more what was not finite.
        acts_otherwise = any(extra(group, "error_if_nonfinite") or clears(group) for group in groups)
        self.skips = self.clips and self.must_check and not is_watched and not acts_otherwise
        if (average := self.state.average) is not None:
            self._prepare_average(average, params, is_able)

    def step(self) -> bool:
        """Makes the step; False if it was left out for gradients that are not finite."""
        lent: dict[str, Any] = {}
        if self.clips and self.options.clip is not None:
            lent["max_grad_norm"] = self.options.clip
        if self.skips:
            lent["skip_nonfinite"] = True
        if self.averages:
            lent |= {"ema_decay": self.options.average, "ema_warmup": self.options.average_warmup}
        if self.measures:
            lent["stats"] = True
        before = self.optimizer._record.steps if self.averages else 0
        with self._lent(lent) if lent else nullcontext():
            self.optimizer.step()
            if self.measures:
                self._take_in(self.optimizer.stats().values())
        if self.skips and self.optimizer.last_step_skipped:  # waits for the device
            return False
        if self.averages and self.optimizer._record.steps == before:  # a step that only makes states counts nothing
            self.end()
        return True

    def end(self) -> None:
        """From now on the loop averages."""
        if self.averages and self.state.average is not None:
            self.state.average.take_back()
        self.averages = False

    def _take_in(self, stats: Collection[ParameterStats]) -> None:
        self.gradient_norm = math.hypot(*(each.gradient_norm for each in stats))
        weights = math.hypot(*(each.parameter_norm for each in stats))
        update = math.hypot(*(each.update_norm for each in stats))
        self.update_ratio = update / weights if weights else math.nan

    def _prepare_average(self, average: WeightAverage, params: list[Tensor], is_able: bool) -> None:
        """The optimizer averages as long as all its counts of steps are the average's, which a parameter that misses an
        update falls behind."""
        stepped = [id(param) for param in params if param.grad is not None]
        if self._stepped is None:
            self._stepped = stepped
            if is_able and self._counts_agree(average, params):
                self.averages = True
                average.keep_in(self.optimizer, [p for p in params if p.grad is not None])
        elif self.averages and not (is_able and stepped == self._stepped):
            self.end()

    def _counts_agree(self, average: WeightAverage, params: list[Tensor]) -> bool:
        """Whether what has a gradient has made as many steps as the average, and nothing else has made any."""
        if not self.must_check and any(extra(group, "skip_nonfinite") for group in self.optimizer.param_groups):
            return False  # the optimizer alone knows, or a device, which steps it has left out
        for param in params:
            state = self.optimizer.state.get(param)
            count = state.get("step") if state else 0
            if count is None or float(count) != (0 if param.grad is None else average.count):
                return False
        return True

    @contextmanager
    def _lent(self, options: dict[str, Any]) -> Iterator[None]:
        """The groups have these options inside, as far as they say nothing of their own."""
        lent = [
            (group, name, name in group, group.get(name))
            for group in self.optimizer.param_groups
            for name in options
            if (value := extra(group, name)) is None or (DEFAULTS[name] is False and not value)
        ]
        try:
            for group, name, *_ in lent:
                group[name] = options[name]
            yield
        finally:
            for group, name, was_there, value in lent:
                group[name] = value
                if not was_there:
                    del group[name]


def steps_alone(optimizer: Any) -> bool:
    """Whether it is one of trainopt's optimizers, and nobody comes between it and its step.

    Hooks and a `step` of somebody's own see clipped gradients, and may change weights before these are averaged.
    """
    return (
        isinstance(optimizer, Fused)
        and type(optimizer).step is Fused.step
        and "step" not in vars(optimizer)
        and not optimizer._has_hooks()
        and not any(group.get("differentiable") for group in optimizer.param_groups)
    )


def _is_on_engine(param: Tensor) -> bool:
    return (param.is_cpu or param.device.type in DEVICE_TYPES) and not is_dtensor(param)
