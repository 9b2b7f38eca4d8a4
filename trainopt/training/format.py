"""The form of a checkpoint's content: the type of each field, and older forms.

It is numbers, tensors, strings, dicts and lists alone, for `torch.load(weights_only=True)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from trainopt.training import random_state
from trainopt.training.arguments import is_plain
from trainopt.training.checkpoint import CorruptCheckpoint
from trainopt.training.history import Interval
from trainopt.training.trained import plain_name
from trainopt.training.watch import Watch
from trainopt.training.window import Window

FORMAT = 2  # 1, without the loss's own state, is read too

#: The type of each field; a dict stands for one with at least these, None among several for a field that may be None,
#: object for what is its owner's affair.
FIELDS: dict[str, Any] = {
    "format": int,
    "model": {},
    "optimizer": {"state": {}, "param_groups": list},
    "schedule": object,
    "scaler": (dict, None),
    "average": (dict, None),
    "counters": {
        **dict.fromkeys(("step", "epoch", "batch", "samples", "skipped", "skipped_in_a_row", "validated_step"), int),
        "train_loss": float,
    },
    "interval": {"total": float, "counted": (float, int), "samples": int},
    "watch": {},
    "best": {"value": (float, int, None), "step": (int, None), "since": int, "weights": (dict, None)},
    "data": {},
    "window": (dict, None),
    "gradients": (list, None),
    "random": list,
}
DATA = {"seed": int, "generators": list, "batch_size": (int, str, None), "shuffle": bool, "batches": (int, None)}
NEW_FIELDS = {"criterion": {}, "training_weights": (list, None), "given": (dict, None)}  # since format 2


def check_fields(state: dict[str, Any]) -> None:
    """CorruptCheckpoint for what is no state of any run: a field that is missing, or of the wrong type."""
    has_format = isinstance(state.get("format"), int) and not isinstance(state["format"], bool)
    if has_format and state["format"] > FORMAT:
        return  # of a later version; whoever takes it over says so
    check_types(state, FIELDS | (NEW_FIELDS if has_format and state["format"] > 1 else {}), "")
    for name, value in state["counters"].items():
        if isinstance(value, int) and value < (-1 if name == "validated_step" else 0):
            raise CorruptCheckpoint(f"its counters.{name} is {value}")
    if state["average"] is not None:
        check_types(state["average"], {"count": int, "log_bias": float, "weights": {}}, "average.")
    check_types(state["data"], DATA, "data.")
    check_optimizer(state)
    if state.get("given") is not None:
        check_given(state["given"])
    for name, part in (("watch", Watch()), ("interval", Interval())):
        check_same_types(state[name], part.state_dict(), name)
        with taken_over(name):
            part.load_state_dict(state[name])
    own = random_state.capture()
    for index, generators in enumerate(state["random"]):
        check_types(generators, {"python": tuple, "torch": Tensor}, f"random.{index}.")
        check_same_types(generators, own, f"random.{index}")
    if state["window"] is not None:
        with taken_over("window"):
            Window.from_state(upgraded(state)["window"], torch.device("cpu"))


@contextmanager
def taken_over(name: str) -> Iterator[None]:
    """CorruptCheckpoint where a part's own loading fails."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CorruptCheckpoint(f"its {name} cannot be taken over: {type(error).__name__}: {error}") from error


def check_optimizer(state: dict[str, Any]) -> None:
    """Whose state each entry is, and as many gradients as parameters."""
    owners: list[Any] = []
    for index, group in enumerate(state["optimizer"]["param_groups"]):
        check_types(group, {"params": list}, f"optimizer.param_groups.{index}.")
        rate = group.get("lr", 0.0)
        rate = rate.item() if isinstance(rate, Tensor) and rate.numel() == 1 else rate
        if type(rate) not in (int, float) or rate != rate:
            raise CorruptCheckpoint(f"its optimizer.param_groups.{index}.lr is {shown(rate)}")
        owners += group["params"]
    numbers = {owner for owner in owners if type(owner) is int}
    entries = {key: value for key, value in state["optimizer"]["state"].items() if type(key) is int}
    if len(numbers) < len(owners) or not numbers.issuperset(entries):  # keys that are no numbers are nobody's
        raise CorruptCheckpoint("its optimizer.param_groups do not say whose states there are")
    for index, values in entries.items():
        check_types(values, {}, f"optimizer.state.{index}.")
    found = state["gradients"]
    if found is not None and (len(found) != len(owners) or any(type(each) not in (Tensor, NoneType) for each in found)):
        raise CorruptCheckpoint(f"its gradients are not those of {len(owners)} parameters")


def check_given(given: dict[str, Any]) -> None:
    """What `trainopt.training.arguments` compares: plain values by name."""
    check_types(given, {"options": {}, "optimizer": {"class": str, "groups": list}, "schedule": (dict, None)}, "given.")
    parts = [given["options"], *given["optimizer"]["groups"]]
    if given["schedule"] is not None:
        check_types(given["schedule"], {"class": str}, "given.schedule.")
        parts.append(given["schedule"])
    if not all(isinstance(part, dict) and all(map(is_plain, part.values())) for part in parts):
        raise CorruptCheckpoint("its given has something that is no plain value")


def check_same_types(value: Any, own: Any, where: str) -> None:
    """CorruptCheckpoint where something is of another type than in a state that this program would write itself.

    A number may stand for a number, and anything for None. Of a dict the common keys are looked at, for another version
    may have others.
    """
    numbers = (int, float)
    if type(value) is not type(own) and own is not None and not (type(value) in numbers and type(own) in numbers):
        raise CorruptCheckpoint(f"its {where} is {shown(value)}")
    if isinstance(own, dict):
        for name in own.keys() & value.keys():
            check_same_types(value[name], own[name], f"{where}.{name}")
    elif isinstance(own, tuple):
        if len(value) != len(own):
            raise CorruptCheckpoint(f"its {where} has {len(value)} entries, not {len(own)}")
        for index, (each, other) in enumerate(zip(value, own, strict=True)):
            check_same_types(each, other, f"{where}.{index}")
    elif isinstance(own, Tensor) and (value.dtype, value.shape) != (own.dtype, own.shape):
        raise CorruptCheckpoint(f"its {where} is of another shape or dtype")


def check_types(state: Any, fields: dict[str, Any], where: str) -> None:
    if not isinstance(state, dict):
        raise CorruptCheckpoint(f"its {where.rstrip('.') or 'content'} is a {type(state).__name__}, not a dict")
    for name, types in fields.items():
        if name not in state:
            raise CorruptCheckpoint(f"it has no {where}{name}")
        value = state[name]
        if isinstance(types, dict):
            check_types(value, types, f"{where}{name}.")
            continue
        allowed = types if isinstance(types, tuple) else (types,)
        if object not in allowed and type(value) not in allowed and not (value is None and None in allowed):
            raise CorruptCheckpoint(f"its {where}{name} is {shown(value)}")


def shown(value: Any) -> str:
    is_short = isinstance(value, int | float | str) and len(str(value)) < 40
    return f"{value!r}" if is_short else f"a {type(value).__name__}"


def upgraded(state: dict[str, Any]) -> dict[str, Any]:
    """A state of format 1 as one of this format; any other as it is."""
    if state["format"] != 1:
        return state
    model = {plain_name(name): value for name, value in state["model"].items()}
    state = {**state, "format": FORMAT, "model": model, "criterion": None, "training_weights": None, "given": None}
    if (average := state["average"]) is not None:
        weights = {plain_name(name): value for name, value in average["weights"].items()}
        state["average"] = {**average, "weights": weights}
    if (weights := state["best"]["weights"]) is not None:
        best = {plain_name(name): value for name, value in weights.items()}
        state["best"] = {**state["best"], "weights": {"model": best}}
    if (window := state["window"]) is not None:
        window = {name: value for name, value in window.items() if name != "asked_to_stop"}
        state["window"] = {
            **window,
            "planned": window["counts"],
            "counts": window["counts"][: window["done"]],
            "asked": "",
        }
    return state
