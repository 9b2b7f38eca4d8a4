"""State dicts: what trainopt adds to torch's loading of them."""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from trainopt.optim import average, code8, precision
from trainopt.optim.options import STOCK_DEFAULTS, not_default, places_of
from trainopt.optim.report import name_of
from trainopt.optim.state_dtype import are_apart, cast_states, has_codes, keys_of
from trainopt.optim.states import States, widen_counts


@contextmanager
def adapted(optimizer: States) -> Iterator[None]:
    """While torch loads a state dict in here, its groups are adapted to the optimizer's; its counts are put right."""
    saved: dict[str, Any] = {}

    def adapt(_: Any, given: dict[str, Any]) -> dict[str, Any]:
        saved_groups, own_groups = given["param_groups"], optimizer.param_groups
        groups = [_adapt_group(optimizer, *both) for both in zip(saved_groups, own_groups, strict=False)]
        for group, own_group in zip(groups, own_groups, strict=False):
            optimizer._check_group({**own_group, **group})
            optimizer._check_storage({**group, "params": own_group["params"]})
        saved.update({**given, "param_groups": [*groups, *saved_groups[len(groups) :]]})
        own = list(_in_own_dtypes(optimizer, saved))  # states that torch is not to cast
        for key, name, param in own:
            if name in optimizer._numbers:
                continue
            _check_shape(optimizer, name, saved["state"][key][name], param, "a parameter")
            if name + code8.SUFFIX in saved["state"][key] or saved["state"][key][name].dtype is torch.uint8:
                code8.scale_of(saved["state"][key], name)
        optimizer._uncast = [(param, name, saved["state"][key][name]) for key, name, param in own]
        # Numbers stay, so that they have their place among the keys, and are put over what torch makes of them.
        left_out = [(key, name) for key, name, _ in own if name not in optimizer._numbers]
        return {**saved, "state": _without(saved["state"], left_out)}

    # The last of the pre-hooks: whatever form the state dict came in, it has torch's form by then.
    adapting = optimizer.register_load_state_dict_pre_hook(adapt)
    try:
        yield
    finally:
        adapting.remove()
        optimizer.__dict__.pop("_uncast", None)
    _restore_counts(optimizer, saved)


@contextmanager
def keeping_types(optimizer: Any) -> Iterator[None]:
    """While one of trainopt's optimizers loads a state dict in here, numbers of parameters, such as NAdam's running
    product, stay in the type that they were saved in, so that it goes on to the same bits.

    torch casts them to their parameter's type: in a float64 one a float32 product is no longer rounded at each step.
    """
    optimizer.__dict__["_keeps_types"] = True
    try:
        yield
    finally:
        del optimizer.__dict__["_keeps_types"]


def _put_back(optimizer: States, state: dict[str, Any]) -> None:
    """Puts what torch was not to cast into what it has loaded, in the dtypes that the groups call for."""
    keeps_types = optimizer.__dict__.get("_keeps_types", False)
    for param, name, value in optimizer.__dict__.get("_uncast", ()):
        dtype = average.dtype_of(param) if name == average.KEY else None
        own = state["state"].setdefault(param, {})
        device = param.device
        if name in optimizer._numbers:  # as torch casts it, but for what that would lose
            device, dtype = optimizer._device_of_number(name, param, own), value.dtype
            if param.is_floating_point() and not (keeps_types and dtype.itemsize >= 4):
                dtype = torch.promote_types(dtype, param.dtype)
        own[name] = value.to(device, dtype, copy=True)
    for group in state["param_groups"]:
        for param in group["params"]:
            own = state["state"].get(param)
            if own and (are_apart(group, param) or has_codes(own, optimizer._states)):
                cast_states(optimizer, own, group, param)


def _adapt_group(optimizer: States, saved: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    # A class of torch's misses its own options as torch does.
    extras = optimizer.EXTRAS
    kept = extras if optimizer._torch_class is not None else own.keys() - {"params", "param_names"}
    group = {**{name: value for name, value in own.items() if name in kept}, **saved}
    for name in extras.keys() & saved.keys() - own.keys():
        if not not_default({name: saved[name]}):  # from a file of the days when every group had every option
            del group[name]
    saved_names, names = saved.get("param_names"), own.get("param_names")
    if saved_names and names and saved_names != names and sorted(saved_names) == sorted(names):
        id_of = dict(zip(saved_names, saved["params"], strict=True))
        group.update(params=[id_of[name] for name in names], param_names=list(names))
    return group


def _restore_counts(optimizer: States, saved: dict[str, Any]) -> None:
    """Gives counts that noise has made float64 back what torch has rounded to float32 (fused and capturable)."""
    for saved_group, group in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        for key, param in zip(saved_group["params"], group["params"], strict=True):
            if not precision.is_random(group, param):
                continue
            count = saved["state"][key].get("step") if key in saved["state"] else None
            if isinstance(count, torch.Tensor) and count.dtype is torch.float64:
                optimizer.state[param]["step"] = count.to(optimizer.state[param]["step"].device, copy=True)


def _in_own_dtypes(optimizer: States, saved: dict[str, Any]) -> Iterator[tuple[Any, str, torch.Tensor]]:
    """What was saved of states that are not to have their parameter's dtype, to which torch casts all that it loads:
    (the parameter's key in the file, the state's key, the parameter)."""
    for saved_group, group in zip(saved["param_groups"], optimizer.param_groups, strict=False):
        for key, param in zip(saved_group["params"], group["params"], strict=False):
            state = saved["state"].get(key)
            if not isinstance(state, dict):
                continue
            names = [average.KEY, precision.KEY, *optimizer._numbers]
            if are_apart(saved_group, param) or has_codes(state, optimizer._states):
                names += keys_of(optimizer._states)
            for name in names:
                if isinstance(state.get(name), torch.Tensor):
                    yield key, name, param


def _without(state: dict[Any, Any], left_out: Iterable[tuple[Any, str]]) -> dict[Any, Any]:
    """A state dict's states without some of them."""
    kept = {key: dict(value) if isinstance(value, dict) else value for key, value in state.items()}
    for key, name in left_out:
        del kept[key][name]
    return kept


def prepare(optimizer: States, state: dict[str, Any]) -> dict[str, Any]:
    """What torch's `load_state_dict` hands to `__setstate__`, made the optimizer's own: checked, with states that are
    copies, and with the groups that are there: a wrapper or a scheduler may hold them."""
    _check_shapes(optimizer, state)
    for key, param_state in state["state"].items():
        if isinstance(param_state, dict):
            state["state"][key] = {name: copy_of(value) for name, value in param_state.items()}
    _put_back(optimizer, state)
    own, loaded = optimizer.param_groups, state["param_groups"]
    if not isinstance(own, list) or len(own) != len(loaded):
        return state
    for group, values in zip(own, loaded, strict=True):
        if group is not values:
            group.clear()
            group.update(values)
    return {**state, "param_groups": own}


def _check_shapes(optimizer: States, state: dict[str, Any]) -> None:
    for group_index, group in enumerate(state["param_groups"]):
        for i, param in enumerate(group["params"]):
            param_state = state["state"].get(param, {})
            for name in (*optimizer._states, average.KEY, precision.KEY):
                _check_shape(optimizer, name, param_state.get(name), param, name_of(group, group_index, i))


def _check_shape(optimizer: States, name: str, value: Any, param: torch.Tensor, whose: str) -> None:
    wanted = optimizer._shape_of(name, param)
    if not isinstance(value, torch.Tensor) or name.endswith(code8.SUFFIX) or value.shape == wanted:
        return
    raise ValueError(
        f"loaded state dict: {name} of {whose} has shape {tuple(value.shape)}, but the parameter has shape"
        f" {tuple(param.shape)}" + (f", for which it is {tuple(wanted)}" if wanted != param.shape else "")
    )


def complete(optimizer: States) -> None:
    """Completes what was loaded or unpickled, as torch's classes do in `__setstate__`."""
    widen_counts(optimizer.state, optimizer._numbers)
    if optimizer._torch_class is None:  # a pickle of days when there were fewer options
        arguments = inspect.signature(type(optimizer)).parameters.values()
        known = {*STOCK_DEFAULTS, *(name for name, _ in places_of(optimizer._rule))}
        of_class = {argument.name: argument.default for argument in arguments if argument.name in known}
        defaults = {n: v for n, v in {**of_class, **optimizer.defaults}.items() if n not in optimizer.EXTRAS}
        for group in optimizer.param_groups:
            group.update({name: value for name, value in defaults.items() if name not in group})


def copy_of(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
