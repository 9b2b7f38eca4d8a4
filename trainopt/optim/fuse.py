"""Taking over an optimizer that somebody else made."""

from types import MethodType
from typing import Any

import torch

from trainopt import originals
from trainopt.optim.adam import Adam
from trainopt.optim.adamw import AdamW
from trainopt.optim.base import Fused
from trainopt.optim.sgd import SGD

_FUSED: dict[type, type[Fused]] = {originals.SGD: SGD, originals.Adam: Adam, originals.AdamW: AdamW}


def fuse(optimizer: torch.optim.Optimizer) -> Fused:
    """The trainopt optimizer that carries on where a torch.optim SGD, Adam or AdamW stands.

    It shares the other's param_groups and state, the very same objects, and its hooks: a learning-rate scheduler that
    was made with the old optimizer goes on working, and the old optimizer itself could. trainopt's own options (l1,
    noise, …) are added to the groups with their defaults, which change nothing.

    Args:
        optimizer: an instance of exactly one of these three classes; one of trainopt's own is returned as it is.

    Raises:
        TypeError: for any other class. A subclass may compute something else.
    """
    if isinstance(optimizer, Fused):
        return optimizer
    cls = _FUSED.get(type(optimizer))
    if cls is None:
        known = ", ".join(f"torch.optim.{torchs.__name__}" for torchs in _FUSED)
        raise TypeError(f"fuse takes {known}, not {type(optimizer).__module__}.{type(optimizer).__qualname__}")
    fused = object.__new__(cls)
    fused.__dict__.update(optimizer.__dict__)
    fused.defaults = {**cls.EXTRAS, **optimizer.defaults}
    fused._complete_groups()
    if "step" in fused.__dict__:  # a scheduler watches whether the old one's step was called
        fused.__dict__["step"] = MethodType(_step_and_tell(optimizer), fused)
    if "_schedule_watch" in fused.__dict__:
        fused.__dict__["_schedule_watch"].follow(fused)
    return fused


def _step_and_tell(watched: Any) -> Any:
    def step(self: Fused, closure: Any = None) -> Any:
        watched._opt_called = True
        return type(self).step(self, closure)

    return step
