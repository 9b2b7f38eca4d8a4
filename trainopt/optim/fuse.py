"""Taking over an optimizer that somebody else made."""

import inspect
import warnings
from typing import Any, TypeVar

from trainopt import originals
from trainopt.optim.adam import Adam
from trainopt.optim.adamw import AdamW
from trainopt.optim.base import Fused, widen_counts
from trainopt.optim.sgd import SGD
from trainopt.optim.wrappers import unwrapped

_FUSED: dict[type, type[Fused]] = {originals.SGD: SGD, originals.Adam: Adam, originals.AdamW: AdamW}

AnyOptimizer = TypeVar("AnyOptimizer", bound=Any)


def fuse(optimizer: AnyOptimizer) -> AnyOptimizer:
    """Makes a torch.optim SGD, Adam or AdamW the trainopt optimizer of that name, which carries on where it stands.

        optimizer = trainopt.fuse(optimizer)

    The optimizer stays the object that it is, with its groups, state and hooks, and only its class is another: so
    whoever holds it (a learning-rate scheduler, a wrapper, a trainer) goes on working, also after `load_state_dict`.

    Args:
        optimizer: an instance of exactly one of these three classes, or a wrapper that holds one in ``.optimizer``, as
            Accelerate's and Fabric's do. One of trainopt's own is left as it is.

    Returns:
        What was given.

    Raises:
        TypeError: for any other class. A subclass may compute something else.
    """
    inner = unwrapped(optimizer)
    if isinstance(inner, Fused):
        return optimizer
    torchs = type(inner)
    cls = _FUSED.get(torchs)
    if cls is None:
        known = ", ".join(f"torch.optim.{torchs.__name__}" for torchs in _FUSED)
        raise TypeError(f"fuse takes {known}, not {torchs.__module__}.{torchs.__qualname__}")
    step = inner.__dict__.get("step")
    inner.__class__ = cls
    inner._start_recording()
    widen_counts(inner.state)
    if step is not None:
        if _called_by(step) is torchs.step:
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
