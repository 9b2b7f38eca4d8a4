"""What a run was given, and what becomes of it when the same run is started again with something else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from trainopt.training.options import Options

Given = dict[str, Any]

#: What is done about an option that differs; any other holds from now on.
EFFECTS = {
    "epochs": "the run now ends there",
    "steps": "the run now ends there",
    "accumulation": "it holds from the next update on",
    "monitor": "the best begins anew",
    "maximize": "the best begins anew",
}
#: Options that may differ without a word: where a run lies, and whether to resume, say nothing about it.
SILENT = ("directory", "resume", "seed")
#: What an optimizer's groups hold that is no choice of the person's.
NO_CHOICE = ("params", "param_names", "initial_lr", "train_mode")


def given_to(options: Options, optimizer: torch.optim.Optimizer, schedule: Any) -> Given:
    """The options, and the plain numbers of the optimizer and the schedule, before the first update."""
    groups = [scalars(group, NO_CHOICE) for group in optimizer.param_groups]
    state = {} if schedule is None else schedule.state_dict()
    return {
        "options": options.plain(),
        "optimizer": {"class": type(optimizer).__name__, "groups": groups},
        "schedule": None if schedule is None else {**scalars(state), "class": type(schedule).__name__},
    }


def scalars(values: Any, left_out: tuple[str, ...] = ()) -> dict[str, Any]:
    """The entries of a mapping that are numbers, strings, booleans, None, or tuples and lists of these."""
    found = {}
    for name, value in values.items() if isinstance(values, Mapping) else ():
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            value = value.item()
        if name not in left_out and not str(name).startswith("_") and is_plain(value):
            found[str(name)] = value
    return found


def is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def differences(before: Given, now: Given) -> Iterator[str]:
    """A sentence for each thing that a run was given before and is given otherwise now, and what is done about it."""
    for name, value in now["options"].items():
        if name not in SILENT and name in before["options"] and before["options"][name] != value:
            old = before["options"][name]
            yield f"{name} was {old!r} and is {value!r}: {effect_of(name, old, value)}"
    yield from differences_of("optimizer", before["optimizer"], now["optimizer"])
    if (before["schedule"] is None) != (now["schedule"] is None):
        had, has = ("none" if each["schedule"] is None else each["schedule"]["class"] for each in (before, now))
        what = "it begins now" if before["schedule"] is None else "the learning rate stays where it was"
        yield f"schedule was {had} and is {has}: {what}"
    elif now["schedule"] is not None:
        yield from differences_of("schedule", before["schedule"], now["schedule"])


def effect_of(name: str, before: Any, now: Any) -> str:
    if name == "average" and before is None:
        return "the average begins with the next update"
    if name == "average" and now is None:
        return "the average is dropped"
    if name == "early_stopping" and before is None:
        return "the best begins anew, for its weights were not kept"
    return EFFECTS.get(name, "the new one holds from here on")


def differences_of(owner: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Those of the optimizer's or the schedule's own numbers, which come back with its state."""
    if before["class"] != now["class"]:
        yield f"{owner} was {before['class']} and is {now['class']}: its state is taken over as far as it fits"
        return
    old, new = flat(before), flat(now)
    for name in new:
        if name in old and not is_same(old[name], new[name]):
            yield f"{owner}: {name} was {old[name]!r} and is {new[name]!r}: the checkpoint's is kept, with its state"


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers by name; those of several groups with their index."""
    groups = values.get("groups", [])
    of_groups = {
        name if len(groups) == 1 else f"{name} of group {index}": value
        for index, group in enumerate(groups)
        for name, value in group.items()
    }
    return {name: value for name, value in values.items() if name not in ("class", "groups")} | of_groups


def is_same(before: Any, now: Any) -> bool:
    """Whether two are equal; lists are tuples here, and NaN is NaN."""
    if isinstance(before, list | tuple) and isinstance(now, list | tuple):
        return len(before) == len(now) and all(map(is_same, before, now))
    return before == now or (before != before and now != now)
