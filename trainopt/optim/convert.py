"""Changing the dtypes of the states that are there."""

from typing import Any

from trainopt.optim.state_dtype import cast_states, check, check_params
from trainopt.optim.states import States
from trainopt.optim.wrappers import unwrapped


def convert_state(optimizer: Any, state_dtype: Any) -> None:
    """Stores an optimizer's states in other dtypes from now on, those that are there and new ones.

    Values are rounded to nearest. So a run changes precision midway, and a checkpoint of another precision goes on.

    Args:
        optimizer: one of trainopt's.
        state_dtype: as the option of that name: "float32", "bfloat16", "float16" or the torch.dtype; a dict of these by
            the name of the state; or None for each parameter's own dtype.

    Raises:
        TypeError: the optimizer is none of trainopt's.
        ValueError: no such dtype or state, or a parameter of float64 or complex numbers; nothing has been changed then.
    """
    optimizer = unwrapped(optimizer)
    if not isinstance(optimizer, States):
        raise TypeError(f"convert_state: {type(optimizer).__qualname__} is not one of trainopt's optimizers")
    check(state_dtype, optimizer._states)
    for group in optimizer.param_groups:
        check_params({**group, "state_dtype": state_dtype})
    for group in optimizer.param_groups:
        if state_dtype is None:
            group.pop("state_dtype", None)
        else:
            group["state_dtype"] = state_dtype
        for param in group["params"]:
            cast_states(optimizer.state.get(param, {}), group, param, optimizer._states)
