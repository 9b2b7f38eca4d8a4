"""State dicts of Muon: AdamW loads its part itself, and torch does not see what it would cast."""

from collections.abc import Iterator
from typing import Any

import torch

from trainopt.optim.loading import copy_of
from trainopt.optim.matrix.options import EXTRAS, is_muons
from trainopt.optim.matrix.update import BUFFER, SECOND, second_shape
from trainopt.optim.report import name_of

Group = dict[str, Any]


class Loading:
    """One call of `load_state_dict`: `take` sees what was saved before torch does, `put` what torch has made of it."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._adamw: dict[str, Any] = {}  # its own state dict
        self._seconds: list[tuple[torch.Tensor, torch.Tensor]] = []  # (parameter, NorMuon's state)

    def take(self, _: Any, saved: dict[str, Any]) -> dict[str, Any]:
        """Checks a state dict, and leaves out of it what is not torch's to load."""
        own = self._optimizer.param_groups
        if [len(g["params"]) for g in saved["param_groups"]] != [len(g["params"]) for g in own]:
            return saved  # torch's error
        groups = [_adapted(i, *both) for i, both in enumerate(zip(saved["param_groups"], own, strict=True))]
        state = {key: dict(value) if isinstance(value, dict) else value for key, value in saved["state"].items()}
        adamw_groups = [group for group in groups if not is_muons(group)]
        keys = {key for group in adamw_groups for key in group["params"]}
        self._adamw = {"state": {key: state.pop(key) for key in keys & state.keys()}, "param_groups": adamw_groups}
        for key, param, name, group in _matrices(groups, own):
            values = state.get(key, {})
            _check_shape(values.get(BUFFER), param.shape, BUFFER, name)
            if (second := values.get(SECOND)) is not None:
                _check_shape(second, second_shape(param, group), SECOND, name)
                self._seconds.append((param, values.pop(SECOND)))
        return {**saved, "state": state, "param_groups": groups}

    def put(self, loaded: dict[str, Any]) -> dict[str, Any]:
        """What the optimizer is to hold, in the groups that are there: a wrapper or a scheduler may hold them."""
        own = self._optimizer.param_groups
        adamw = self._optimizer.adamw
        if adamw is not None:
            adamw.load_state_dict(self._adamw)  # it raises before it has changed anything
        state = loaded["state"]
        for key, values in state.items():
            state[key] = (
                {name: copy_of(value) for name, value in values.items()} if isinstance(values, dict) else values
            )
        for param, second in self._seconds:
            dtype = torch.float64 if param.dtype is torch.float64 else torch.float32
            state[param][SECOND] = second.to(param.device, dtype, copy=True)
        if adamw is not None:
            state.update(adamw.state)
        for group, values in zip(own, loaded["param_groups"], strict=True):
            if is_muons(group):
                group.clear()
                group.update(values)
        return {**loaded, "state": state, "param_groups": own}


def _adapted(index: int, saved: Group, own: Group) -> Group:
    """A saved group as this optimizer takes it; ValueError if it is the other algorithm's."""
    if is_muons(saved) != is_muons(own):
        names = ["Muon" if is_muons(group) else "AdamW" for group in (saved, own)]
        raise ValueError(f"loaded state dict: group {index} is {names[0]}'s, and the optimizer's is {names[1]}'s")
    if not is_muons(own):
        return saved
    group = {**{name: own[name] for name in EXTRAS if name in own}, **saved}
    saved_names, own_names = saved.get("param_names"), own.get("param_names")
    if saved_names and own_names and saved_names != own_names and sorted(saved_names) == sorted(own_names):
        key_of = dict(zip(saved_names, saved["params"], strict=True))
        group.update(params=[key_of[name] for name in own_names], param_names=list(own_names))
    return group


def _matrices(saved: list[Group], own: list[Group]) -> Iterator[tuple[Any, torch.Tensor, str, Group]]:
    """(key in the state dict, parameter, what messages call it, its saved group) for all parameters of Muon's."""
    for index, (group, own_group) in enumerate(zip(saved, own, strict=True)):
        if is_muons(group):
            for i, (key, param) in enumerate(zip(group["params"], own_group["params"], strict=True)):
                yield key, param, name_of(own_group, index, i), group


def _check_shape(value: Any, shape: Any, name: str, whose: str) -> None:
    if isinstance(value, torch.Tensor) and tuple(value.shape) != tuple(shape):
        raise ValueError(
            f"loaded state dict: {name} of {whose} has shape {tuple(value.shape)}, but {tuple(shape)} is due"
        )
