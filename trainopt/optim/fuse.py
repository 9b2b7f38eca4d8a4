"""Taking over an optimizer that somebody else made."""

import inspect
import warnings
from typing import Any, TypeVar

from trainopt import originals
from trainopt.optim import registry
from trainopt.optim.matrix.muon import Muon, is_muon
from trainopt.optim.states import States, widen_counts
from trainopt.optim.wrappers import unwrapped

AnyOptimizer = TypeVar("AnyOptimizer", bound=Any)


def counterparts() -> dict[type, type]:
    """By each class of torch's that trainopt has one for, trainopt's."""
    return {**registry.of_torch(), originals.Muon: Muon}


def fuse(optimizer: AnyOptimizer) -> AnyOptimizer:
    """Makes an optimizer of torch's the trainopt optimizer of that name, which carries on where it stands.

        optimizer = trainopt.fuse(optimizer)

    The optimizer stays the object that it is, with its groups, state and hooks, and only its class is another: so
    whoever holds it (a learning-rate scheduler, a wrapper, a trainer) goes on working, also after `load_state_dict`.

    Args:
        optimizer: an instance of exactly a class of torch.optim's that trainopt has too (SGD, Adam, AdamW, RMSprop, …),
            or a wrapper that holds one in ``.optimizer``, as Accelerate's and Fabric's do. One of trainopt's own is
            left as it is.

    Returns:
        What was given.

    Raises:
        TypeError: for any other class. A subclass may compute something else.
    """
    inner = unwrapped(optimizer)
    if isinstance(inner, States) or is_muon(inner):
        return optimizer
    stock, known_classes = type(inner), counterparts()
    cls = known_classes.get(stock)
    if cls is None:
        known = ", ".join(f"torch.optim.{torch_class.__name__}" for torch_class in known_classes)
        raise TypeError(f"fuse takes {known}, not {stock.__module__}.{stock.__qualname__}")
    step = inner.__dict__.get("step")
    inner.__class__ = cls
    if isinstance(inner, States):
        inner._start_recording()
        widen_counts(inner.state, inner._numbers)
    if step is not None:
        if _called_by(step) is stock.step:
            del inner.__dict__["step"]  # a scheduler's, to see that it is called: ours tells by itself
        else:
            warnings.warn(
                f"fuse: the optimizer's step was replaced by {step!r}, which goes on calling torch's", stacklevel=2
            )
    return optimizer


def _called_by(step: Any) -> Any:
    """The function that a bound method, or the wrapper of a scheduler of torch's, calls."""
    step = step.__func__ if inspect.ismethod(step) else step
    return step.__wrapped__ if getattr(step, "_wrapped_by_lr_sched", False) else step
