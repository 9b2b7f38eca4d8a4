"""Wrappers of an optimizer: Accelerate's, Fabric's, Lookahead, schedule-free averaging and their like."""

from typing import Any

_NAMES = ("optimizer", "base_optimizer", "_base_optimizer", "base")


def unwrapped(optimizer: Any) -> Any:
    """The optimizer at the bottom of wrappers that hold the next one in `.optimizer`, or a name that means the same."""
    seen = {id(optimizer)}
    while (held := _held_by(optimizer)) is not None and id(held) not in seen:
        seen.add(id(held))
        optimizer = held
    return optimizer


def _held_by(wrapper: Any) -> Any:
    for name in _NAMES:
        held = getattr(wrapper, name, None)
        if hasattr(held, "param_groups") and hasattr(held, "step"):
            return held
    return None
