"""The options of cross-entropy in one object, from the public functions to whatever computes the loss.

A new option is a field here, in `packed` and, if it has a range, in `check`. See docs/adding-a-loss.md.
"""

import math
from typing import Any, NamedTuple

from trainopt.losses.arguments import number_of


class CrossEntropyOptions(NamedTuple):
    """As the public functions take them, which explain each."""

    reduction: str = "mean"
    ignore_index: Any = -100  # linear_cross_entropy has None too: -100, and due for probabilities
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    empty: str = "nan"
    temperature: float = 1.0


_DEFAULTS = CrossEntropyOptions()


def has_only_torch_options(options: CrossEntropyOptions) -> bool:
    """Whether torch's own function has all that they ask for."""
    return options[3:] == _DEFAULTS[3:]


def with_ignore_index(options: CrossEntropyOptions) -> CrossEntropyOptions:
    """The same for a function that knows no ignore_index=None."""
    return options if options.ignore_index is not None else CrossEntropyOptions(options[0], -100, *options[2:])


def packed(options: CrossEntropyOptions) -> tuple[Any, ...]:
    """What stands for them at the end of the operators' schemas; torch's error for an unknown reduction."""
    reduction, ignore_index, label_smoothing, z_loss, softcap, empty, temperature = options
    return number_of(reduction), ignore_index, label_smoothing, z_loss, softcap or 0.0, empty == "zero", temperature


def check(options: CrossEntropyOptions) -> None:
    """ValueError for an option of trainopt's own that is out of its range."""
    _, _, _, z_loss, softcap, empty, temperature = options
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss must be finite and at least 0, not {z_loss!r}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be None, or finite and greater than 0, not {softcap!r}")
    if empty not in ("nan", "zero"):
        raise ValueError(f"empty must be 'nan' or 'zero', not {empty!r}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be finite and greater than 0, not {temperature!r}")
