"""When the schedule of a run steps: after every update, epoch or validation."""

from __future__ import annotations

import inspect
from typing import Any

from torch.optim.lr_scheduler import ReduceLROnPlateau


class Pace:
    """A schedule, and when it steps: after every update, epoch or validation.

    Args:
        schedule: anything with `step`, `state_dict` and `load_state_dict`. A `step` that asks for `metrics`, as that of
            ReduceLROnPlateau does, is given the latest value of what is monitored; one that asks for `epoch` the passes
            completed.
        every: "update", "epoch" or "validation"; None: a validation or an epoch where it asks for its value, else an
            update.
        is_validated: whether there is validation data.
    """

    def __init__(self, schedule: Any, every: str | None, is_validated: bool) -> None:
        self.schedule = schedule
        if schedule is None:
            self.every, self.asks_for = every, None
            return
        kind = type(schedule).__name__
        missing = [name for name in ("step", "state_dict", "load_state_dict") if not hasattr(schedule, name)]
        if missing:
            raise TypeError(f"schedule is a {kind}, without {', '.join(missing)}")
        self.asks_for = argument_of(schedule)
        asks_for_value = self.asks_for in ("metrics", "metric")
        self.every = every or ("validation" if asks_for_value else "epoch" if self.asks_for else "update")
        if asks_for_value and self.every == "update":
            raise ValueError(
                f"schedule_every is 'update', but schedule is {kind}, which needs the value of a validation"
            )
        if asks_for_value and not is_validated:
            raise ValueError(
                f"schedule is {kind}, which needs the value of a validation, but there is no validation data"
            )
        if self.every == "validation" and not is_validated:
            raise ValueError("schedule_every is 'validation', but there is no validation data")

    def step(self, unit: str, value: float | None, epoch: int) -> None:
        """After an update, an epoch or a validation: a step, if that is what the schedule counts.

        Args:
            value: the latest of what is monitored; None before the first validation: what asks for it does not step.
            epoch: passes over the data completed.
        """
        if unit != self.every or self.schedule is None:
            return
        if self.asks_for is None:
            self.schedule.step()
        elif self.asks_for == "epoch":
            self.schedule.step(epoch)
        elif value is not None:
            self.schedule.step(value)


def argument_of(schedule: Any) -> str | None:
    """The argument without which a schedule's `step` cannot be called: "metrics", "metric", "epoch", or None."""
    if isinstance(schedule, ReduceLROnPlateau):
        return "metrics"
    try:
        parameters = inspect.signature(schedule.step).parameters.values()
    except (TypeError, ValueError):  # a callable that does not tell
        return None
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [each.name for each in parameters if each.kind in kinds and each.default is each.empty]
    if not needed:
        return None
    if len(needed) > 1 or needed[0] not in ("metrics", "metric", "epoch"):
        raise TypeError(f"schedule is a {type(schedule).__name__}, whose step asks for {', '.join(needed)}")
    return needed[0]
