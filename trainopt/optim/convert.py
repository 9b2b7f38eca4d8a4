"""Changing how the states and the parameters that are there are stored."""

from typing import Any

from trainopt.optim import precision as precisions
from trainopt.optim.matrix.muon import is_muon
from trainopt.optim.matrix.options import OWN_DTYPE
from trainopt.optim.options import extra
from trainopt.optim.state_dtype import cast_states, check, check_params
from trainopt.optim.states import States
from trainopt.optim.wrappers import unwrapped


def convert_state(optimizer: Any, state_dtype: Any, *, precision: str | None = None) -> None:
    """Stores an optimizer's states in other dtypes from now on, those that are there and new ones.

    Values are rounded to nearest. So a run changes precision midway, and a checkpoint of another precision goes on.
    With ``state_dtype=None, precision="native"`` a state dict is one of torch's own class again.

    Args:
        optimizer: one of trainopt's.
        state_dtype: as the option of that name: "float32", "bfloat16", "float16", "8bit" or the torch.dtype; a dict of
            these by the name of the state; or None for each parameter's own dtype.
        precision: as the option of that name, for 16-bit parameters: "native", "master", "master24" or "stochastic".
            Default None: as it is.

    Raises:
        TypeError: the optimizer is none of trainopt's.
        ValueError: no such dtype, state or precision, or a parameter of float64 or complex numbers, or a DTensor for
            8 bits, or a state in 8 bits that has no scales; or a Muon, for its ``adamw`` alone can be converted.
            Nothing has been changed then.
        RuntimeError: inside `averaged_parameters()`.
    """
    optimizer = unwrapped(optimizer)
    if is_muon(optimizer):
        raise ValueError(f"convert_state: {OWN_DTYPE}")
    if not isinstance(optimizer, States):
        raise TypeError(f"convert_state: {type(optimizer).__qualname__} is not one of trainopt's optimizers")
    check(state_dtype, optimizer._states)
    if optimizer._record.holds_averages:
        raise RuntimeError("convert_state: the parameters are their moving averages, inside averaged_parameters()")

    def with_choices(group: dict[str, Any]) -> dict[str, Any]:
        return {**group, "state_dtype": state_dtype, "precision": precision or extra(group, "precision")}

    for group in optimizer.param_groups:
        wanted = with_choices(group)
        check_params(wanted)
        precisions.check_params(wanted)
        if group.get("differentiable") and (state_dtype is not None or wanted["precision"] != "native"):
            raise ValueError("convert_state: differentiable=True does not go with states and parameters stored apart")
    made = []
    for _, group, param in optimizer._enumerate():
        state = dict(optimizer.state.get(param, {}))
        cast_states(optimizer, state, with_choices(group), param)
        made.append((param, state))

    for param, state in made:
        if state:
            for key in optimizer.state[param].keys() - state.keys():
                del optimizer.state[param][key]
            optimizer.state[param].update(state)
    for group in optimizer.param_groups:
        if state_dtype is None:
            group.pop("state_dtype", None)
        else:
            group["state_dtype"] = state_dtype
        if precision is not None:
            _convert_params(optimizer, group, precision)


def _convert_params(optimizer: States, group: dict[str, Any], precision: str) -> None:
    """Stores a group's 16-bit parameters in another way, of the values that they have."""
    before = dict(group)
    if precision == "native":
        group.pop("precision", None)
    else:
        group["precision"] = precision
    to_nearest = {**group, "precision": "native"} if precision == "stochastic" else group
    for param in group["params"] if extra(before, "precision") != precision else ():
        if state := optimizer.state.get(param):
            own = state if precisions.of(before, param) != "native" else {}
            precisions.store_(param, precisions.value_of(param, own), to_nearest, state, 0)
