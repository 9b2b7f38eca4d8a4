"""The dtypes of an optimizer's states (``state_dtype``): in which new ones are made, and ways from one to another."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from trainopt.optim.options import extra

#: What a state can be stored in, whatever its parameter's dtype; by name, for files and command lines.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_of(group: Mapping[str, Any], name: str, param: Tensor) -> torch.dtype:
    """The dtype that a group calls for in a state of a parameter's."""
    chosen = extra(group, "state_dtype")
    if isinstance(chosen, Mapping):
        chosen = chosen.get(name)
    if chosen is None:
        return param.dtype
    return DTYPES[chosen] if isinstance(chosen, str) else chosen


def check(chosen: Any, states: Iterable[str]) -> None:
    """ValueError for a choice that makes no sense for these states."""
    names = tuple(states)
    parts = chosen if isinstance(chosen, Mapping) else {name: chosen for name in names or ("",)}
    for name, dtype in parts.items():
        if name not in names and isinstance(chosen, Mapping):
            raise ValueError(f"Invalid state_dtype: there is no state {name!r} ({', '.join(map(repr, names))})")
        is_known = dtype in DTYPES if isinstance(dtype, str) else dtype in DTYPES.values()
        if not is_known and dtype is not None:
            raise ValueError(
                f"Invalid state_dtype value: {dtype!r} ({', '.join(map(repr, DTYPES))}, or the torch.dtype)"
            )


def check_params(group: Mapping[str, Any]) -> None:
    """ValueError for a group with a choice that makes no sense for its parameters."""
    chosen = extra(group, "state_dtype")
    for param in group["params"] if chosen is not None else ():
        if param.dtype not in DTYPES.values():
            raise ValueError(
                f"state_dtype={chosen!r} is for parameters of {', '.join(DTYPES)}, and one is {param.dtype}: put it in"
                " a group with state_dtype=None"
            )


def cast_states(state: dict[str, Any], group: Mapping[str, Any], param: Tensor, names: Iterable[str]) -> None:
    """Brings a parameter's states into the dtypes that its group calls for."""
    for name in names:
        value = state.get(name)
        if isinstance(value, Tensor) and value.is_floating_point():
            state[name] = value.detach().to(dtype_of(group, name, param))
