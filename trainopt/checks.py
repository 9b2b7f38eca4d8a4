"""Options that make no sense, answered with a sentence that names the option and the value."""

import math
import numbers
import operator
from collections.abc import Iterable
from typing import Any


def whole(owner: Any, name: str, value: Any, low: int = 0) -> int:
    """The value as an int, or a ValueError that names it."""
    try:
        integer = operator.index(value)
    except TypeError:
        integer = low - 1
    if integer < low or isinstance(value, bool):
        raise ValueError(f"{name_of(owner)}: {name} must be a whole number of at least {low}, got {value!r}")
    return integer


def number(owner: Any, name: str, value: Any, above: float | None = None, to: float = math.inf) -> None:
    """A ValueError that names the value, unless it is a finite number from 0 (or above `above`) to `to`."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if not real or value > to or (value < 0 if above is None else value <= above):
        bounds = "of at least 0" if above is None else f"greater than {above:g}"
        limit = "" if to == math.inf else f" and at most {to:g}"
        raise ValueError(f"{name_of(owner)}: {name} must be a finite number {bounds}{limit}, got {value!r}")


def one_of(owner: Any, name: str, value: Any, choices: Iterable[str]) -> None:
    """A ValueError that names the value, unless it is one of these."""
    if value not in tuple(choices):
        raise ValueError(f"{name_of(owner)}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


#: How torch's optimizers call their options in errors, where that is not by their names.
_STOCK_WORDS = {"lr": "learning rate", "eps": "epsilon value", "betas": "beta parameter"}


def stock_option(name: str, value: Any) -> None:
    """A ValueError in the words of torch's optimizers, for a negative number, or a beta outside [0, 1)."""
    words = _STOCK_WORDS.get(name, f"{name} value")
    for index, beta in enumerate(value if name == "betas" else ()):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid {words} at index {index}: {beta}")
    if name != "betas" and not 0.0 <= value:
        raise ValueError(f"Invalid {words}: {value}")


def seed(value: Any) -> None:
    """Likewise, unless it is an integer from 0 to 2**64 - 1."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**64:
        raise ValueError(f"Invalid seed value: {value!r} (an integer from 0 to 2**64 - 1)")


def name_of(owner: Any) -> str:
    """What the option belongs to: a name as it is, a class or function by its own, an object by its class."""
    if isinstance(owner, str):
        return owner
    return owner.__name__ if hasattr(owner, "__name__") else type(owner).__name__
