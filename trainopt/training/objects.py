"""Whether the objects of a run go together, before anything is changed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ReduceLROnPlateau

from trainopt.training.callables import inside
from trainopt.training.data import Source, is_tensors
from trainopt.training.options import Options

Metrics = Mapping[str, Callable[[Any, Any], Any]]


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


def check_objects(
    model: Any, optimizer: Any, options: Options, validation: Any, metrics: Metrics, schedule: Any
) -> torch.device:
    """The model's device; ValueError or TypeError for objects that do not go together."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, not a torch.nn.Module")
    first = next(model.parameters(), None)
    if first is None:
        raise ValueError(f"model, a {type(model).__name__}, has no parameters")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}, not a torch.optim.Optimizer")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("optimizer is LBFGS, whose step needs a closure; fit gives none")
    check_wrappers(model, options)
    if options.monitor != "loss" and options.monitor not in metrics:
        raise ValueError(
            f"monitor is {options.monitor!r}; it must be 'loss' or a metric: {sorted(metrics) or 'there is none'}"
        )
    options.is_larger_better  # noqa: B018  (a ValueError where it is not known)
    if schedule is None and options.schedule_every is not None:
        raise ValueError(f"schedule_every is {options.schedule_every!r}, but there is no schedule")
    for name in ("validate_every", "early_stopping"):
        if validation is None and getattr(options, name) is not None:
            raise ValueError(f"{name} is {getattr(options, name)}, but there is no validation data")
    if "loss" in metrics:
        raise ValueError("metrics has 'loss', the name of the validation loss")
    return first.device


def check_wrappers(model: nn.Module, options: Options) -> None:
    """ValueError for a model in a wrapper that cannot do what the options ask for."""
    wrapper: nn.Module | None = model
    while wrapper is not None:
        if (
            isinstance(wrapper, DistributedDataParallel)
            and getattr(wrapper, "static_graph", False)
            and options.accumulation > 1
        ):
            raise ValueError(
                f"accumulation is {options.accumulation}, but model is a DistributedDataParallel with "
                "static_graph=True, which must average in every backward pass: leave static_graph out, or accumulation"
            )
        wrapper = inside(wrapper)
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ValueError(
            "model is sharded by FullyShardedDataParallel, whose parameters fit cannot save; shard it with "
            "torch.distributed.fsdp.fully_shard"
        )


def check_validation(source: Source) -> None:
    """ValueError for validation data that give no batch, where their length does not say so."""
    if source.length is None:
        batches = source.epoch(seed=0, epoch=0, skip=0)
        if next(batches, None) is None:
            raise ValueError("validation is empty: it gives no batch")


def validation_size(size: int | str | None, validation: Any) -> int | str | None:
    """The size of validation's batches: that of training for plain tensors, or all where they are fewer."""
    if not is_tensors(validation):
        return None
    return "full" if not isinstance(size, int) or size > len(validation[0]) else size
