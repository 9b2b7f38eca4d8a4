"""The arguments of a run: whether they go together, and how they differ from those that it was given before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainopt import checks
from trainopt.optim.matrix.muon import is_muon
from trainopt.optim.matrix.options import OWN_DTYPE
from trainopt.optim.options import extra
from trainopt.optim.state_dtype import DTYPES, check_params
from trainopt.optim.states import States
from trainopt.optim.wrappers import unwrapped
from trainopt.training.criterion.callables import inside
from trainopt.training.data import Source, is_tensors
from trainopt.training.options import Options

Metrics = Mapping[str, Callable[[Any, Any], Any]]


def check_objects(
    model: Any, optimizer: Any, options: Options, validation: Any, metrics: Metrics, schedule: Any
) -> torch.device:
    """The model's device; ValueError or TypeError for objects that do not go together."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, not a torch.nn.Module")
    first = next(model.parameters(), None)
    if first is None:
        raise ValueError(f"model, a {type(model).__name__}, has no parameters")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}, not a torch.optim.Optimizer")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("optimizer is LBFGS, whose step needs a closure; fit gives none")
    check_given_twice(options, optimizer)
    if options.state_dtype is not None:
        check_state_dtype(options.state_dtype, optimizer)
    check_wrappers(model, options)
    if options.monitor != "loss" and options.monitor not in metrics:
        raise ValueError(
            f"monitor is {options.monitor!r}; it must be 'loss' or a metric: {sorted(metrics) or 'there is none'}"
        )
    options.is_larger_better  # noqa: B018  (a ValueError where it is not known)
    if schedule is None and options.schedule_every is not None:
        raise ValueError(f"schedule_every is {options.schedule_every!r}, but there is no schedule")
    for name in ("validate_every", "early_stopping"):
        if validation is None and getattr(options, name) is not None:
            raise ValueError(f"{name} is {getattr(options, name)}, but there is no validation data")
    if "loss" in metrics:
        raise ValueError("metrics has 'loss', the name of the validation loss")
    return first.device


def check_wrappers(model: nn.Module, options: Options) -> None:
    """ValueError for a model in a wrapper that cannot do what the options ask for."""
    wrapper: nn.Module | None = model
    while wrapper is not None:
        if (
            isinstance(wrapper, DistributedDataParallel)
            and getattr(wrapper, "static_graph", False)
            and options.accumulation > 1
        ):
            raise ValueError(
                f"accumulation is {options.accumulation}, but model is a DistributedDataParallel with "
                "static_graph=True, which must average in every backward pass: leave static_graph out, or accumulation"
            )
        wrapper = inside(wrapper)
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ValueError(
            "model is sharded by FullyShardedDataParallel, whose parameters fit cannot save; shard it with "
            "torch.distributed.fsdp.fully_shard"
        )


def check_given_twice(options: Options, optimizer: Any) -> None:
    """ValueError where an option of the run is one of the optimizer's too, and they differ."""
    optimizer = unwrapped(optimizer)
    for group in optimizer.param_groups if isinstance(optimizer, States) else ():
        limit, decay, warmup = (extra(group, name) for name in ("max_grad_norm", "ema_decay", "ema_warmup"))
        if options.clip is not None and limit is not None and limit != options.clip:
            raise ValueError(f"clip is {options.clip}, but optimizer has max_grad_norm={limit!r}: give one of them")
        if options.average is None or decay is None:
            continue
        if (decay, bool(warmup)) != (options.average, options.average_warmup):
            raise ValueError(
                f"average is {options.average} with average_warmup={options.average_warmup}, but optimizer has"
                f" ema_decay={decay!r} with ema_warmup={warmup!r}: give one of them"
            )


def check_state_dtype(chosen: str, optimizer: Any) -> None:
    """ValueError where an optimizer's states cannot be stored in this dtype, or it says otherwise itself."""
    inner = unwrapped(optimizer)
    if is_muon(inner):
        raise ValueError(f"state_dtype is {chosen!r}, but optimizer is a Muon: {OWN_DTYPE}")
    if not isinstance(inner, States):
        raise ValueError(
            f"state_dtype is {chosen!r}, but optimizer is a {type(inner).__module__}.{type(inner).__qualname__}, which"
            " is not one of trainopt's; trainopt.fuse makes one of torch's such a one"
        )
    for group in inner.param_groups:
        own = extra(group, "state_dtype")
        if own is not None and (isinstance(own, Mapping) or DTYPES.get(own, own) != DTYPES[chosen]):
            raise ValueError(f"state_dtype is {chosen!r}, but optimizer has state_dtype={own!r}: give one of them")
        check_params({**group, "state_dtype": chosen})


def check_validation(source: Source) -> None:
    """ValueError for validation data that give no batch, where their length does not say so."""
    if source.length is None:
        batches = source.epoch(seed=0, epoch=0, skip=0)
        if next(batches, None) is None:
            raise ValueError("validation is empty: it gives no batch")


def validation_size(size: int | str | None, validation: Any) -> int | str | None:
    """The size of validation's batches: that of training for plain tensors, or all where they are fewer."""
    if not is_tensors(validation):
        return None
    return "full" if not isinstance(size, int) or size > len(validation[0]) else size


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


def given_to(options: Options, optimizer: torch.optim.Optimizer, schedule: Any, loss: Any) -> Given:
    """The options, and the plain numbers of the optimizer and the schedule, before the first update."""
    groups = [scalars(group, NO_CHOICE) for group in optimizer.param_groups]
    state = {} if schedule is None else schedule.state_dict()
    return {
        "options": options.plain(),
        "optimizer": {"class": type(optimizer).__name__, "groups": groups},
        "schedule": None if schedule is None else {**scalars(state), "class": type(schedule).__name__},
        "loss": checks.name_of(loss),
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
    if before.get("loss", now["loss"]) != now["loss"]:  # older versions did not note it
        yield f"the loss was {before['loss']} and is {now['loss']}: the new one holds from here on"


def effect_of(name: str, before: Any, now: Any) -> str:
    if name == "average" and before is None:
        return "the average begins with the next update"
    if name == "average" and now is None:
        return "the average is dropped"
    if name == "state_dtype" and now is None:
        return "the checkpoint's is kept, with the states"
    if name == "early_stopping" and before is None:
        return "the best begins anew, for its weights were not kept"
    return EFFECTS.get(name, "the new one holds from here on")


def differences_of(owner: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Those of the optimizer's or the schedule's own numbers, which come back with its state."""
    if before["class"] != now["class"]:
        options = "its options are the new ones, but for what a schedule sets; " if owner == "optimizer" else ""
        yield f"{owner} was {before['class']} and is {now['class']}: {options}its state is taken over as far as it fits"
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
