"""The options that trainopt's optimizers have beyond torch's.

They live in param_groups like any other option, but only where they were given or set: a group without one has its
default. So a run that uses none of them has the groups of torch's class, and a distributed checkpoint, which looks up
every key of a group in the file, goes from one library to the other.
"""

from collections.abc import Mapping
from typing import Any

import torch

#: What every optimizer has, with the defaults.
SHARED: dict[str, Any] = {"l1": 0.0, "l1_proximal": False, "noise": 0.0, "seed": 0, "skip_nonfinite": False}
#: What Adam and AdamW have.
ADAM: dict[str, Any] = {"bias_correction": True, **SHARED}


def extra(group: Mapping[str, Any], name: str) -> Any:
    """One of these options in a group."""
    return group[name] if name in group else ADAM[name]


def not_default(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of these options that are not at their defaults; a tensor, which can be filled later, never is."""
    return {name: v for name, v in options.items() if isinstance(v, torch.Tensor) or v != ADAM[name]}


def check_extras(options: Mapping[str, Any]) -> None:
    """ValueError for a value that makes no sense, in the words of torch's own errors."""
    for name in ("l1", "noise"):
        if not 0.0 <= options[name]:
            raise ValueError(f"Invalid {name} value: {options[name]}")
    seed = options["seed"]
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"Invalid seed value: {seed} (an integer from 0 to 2**64 - 1)")
