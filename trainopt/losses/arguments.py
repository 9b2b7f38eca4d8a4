"""What the losses check of their arguments, beyond what torch checks."""

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import _reduction

Function = TypeVar("Function", bound=Callable[..., Any])

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def number_of(reduction: str) -> int:
    """torch's number for a reduction; its own error for one that it does not know."""
    number = _REDUCTIONS.get(reduction) if isinstance(reduction, str) else None
    return _number_by_torch(reduction) if number is None else number


def is_number(value: object) -> bool:
    """Whether it is a number of Python's; what else torch takes or refuses as one is left to torch."""
    return isinstance(value, (int, float))


# What follows may warn, and a compiler cannot trace a warning. It calls these while it traces, and keeps what they
# return: so they warn when a function is compiled, as torch's own losses do.


def assume_constant_result(function: Function) -> Function:
    """As torch.compiler's, which imports the whole compiler: with it `import trainopt` took 1.7 s longer."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@assume_constant_result
def _number_by_torch(reduction: str) -> int:
    return _reduction.get_enum(reduction)


@assume_constant_result
def legacy_reduction(size_average: bool | None, reduce: bool | None) -> str:
    """The reduction that torch's deprecated arguments ask for, with torch's warning."""
    return _reduction.legacy_get_string(size_average, reduce)


def warn_of_broadcasting(input: Tensor, target: Tensor) -> None:
    """torch's warning about two shapes, in the name of who called the caller's caller."""
    if is_compiling():  # there, a size may be known at run time only
        return _warn("Using a target size that is different to the input size. " + _BROADCASTING, 1)
    return _warn(
        f"Using a target size ({target.size()}) that is different to the input size ({input.size()}). " + _BROADCASTING,
        5,
    )


def warn_of_mean() -> None:
    """torch's warning about the mean of kl_div, in the name of who called the caller."""
    _warn(
        "reduction: 'mean' divides the total loss by both the batch size and the support size."
        "'batchmean' divides only by the batch size, and aligns with the KL div math definition."
        "'mean' will be changed to behave the same as 'batchmean' in the next major release.",
        4,
    )


_BROADCASTING = "This will likely lead to incorrect results due to broadcasting. Please ensure they have the same size."


@assume_constant_result
def _warn(message: str, stacklevel: int) -> None:
    warnings.warn(message, stacklevel=stacklevel)
