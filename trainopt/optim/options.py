"""The options that trainopt's optimizers have beyond torch's: names, types, defaults, checks, and how signatures show
them.

They live in param_groups like any other option, but only where they were given or set: a group without one has its
default. So a run that uses none of them has the groups of torch's class, and a distributed checkpoint, which looks up
every key of a group in the file, goes from one library to the other.

A class takes them as ``**extras: Unpack[Extras]``, which type checkers and editors read. `inspect.signature` shows them
one by one, with their defaults (`show_options`).
"""

import functools
import inspect
import numbers
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

import torch

from trainopt import checks
from trainopt._extension import _C


class Extras(TypedDict, total=False):
    """What every optimizer of trainopt takes beyond its formula."""

    l1: float
    l1_proximal: bool
    noise: float
    seed: int
    skip_nonfinite: bool
    max_grad_norm: float | None
    error_if_nonfinite: bool
    zero_grad: str | None
    ema_decay: float | None
    ema_warmup: bool
    state_dtype: str | torch.dtype | dict[str, str | torch.dtype] | None
    precision: str
    cautious: bool
    cautious_weight_decay: bool
    stats: bool


class AdamExtras(Extras, total=False):
    """What Adam and AdamW take beyond torch's."""

    bias_correction: bool


class UnfusedExtras(Extras, total=False):
    """What those take whose class in torch has no ``fused``: with True, GradScaler leaves its scale to the step."""

    fused: bool | None


class ForeachlessOptions(Extras, total=False):
    """What an optimizer takes whose `foreach` has another place among the parameters than torch's."""

    maximize: bool
    capturable: bool
    differentiable: bool
    fused: bool | None


class PlainOptions(ForeachlessOptions, total=False):
    """What an optimizer that torch does not have takes beyond its formula: all that torch's classes have in common."""

    foreach: bool | None


#: The defaults of trainopt's own options: first what only some have, then what all have.
DEFAULTS: dict[str, Any] = {
    "bias_correction": True,
    "fused": None,
    "l1": 0.0,
    "l1_proximal": False,
    "noise": 0.0,
    "seed": 0,
    "skip_nonfinite": False,
    "max_grad_norm": None,
    "error_if_nonfinite": False,
    "zero_grad": None,
    "ema_decay": None,
    "ema_warmup": False,
    "state_dtype": None,
    "precision": "native",
    "cautious": False,
    "cautious_weight_decay": False,
    "stats": False,
}
#: Options of optimizers that torch does not have, which must be at least 0; betas less than 1 besides.
_NOT_NEGATIVE = {
    *("lr", "betas", "eps", "weight_decay", "momentum"),
    *("trust_coeff", "alpha", "alpha_warmup", "beta3_warmup"),
}
#: Those that are true or false.
_FLAGS = (
    *("l1_proximal", "skip_nonfinite", "error_if_nonfinite", "ema_warmup"),
    *("cautious", "cautious_weight_decay", "stats", "bias_correction"),
)
#: Options of torch's and of rules that some of these do not go with.
DECIDING = ("differentiable", "decoupled_weight_decay", "decoupled_decay", "decouple", "no_prox")
#: How 16-bit parameters can be stored: trainopt/optim/precision.py.
PRECISIONS = ("native", "master", "master24", "stochastic")
#: Those of the options that every class of torch's has.
STOCK_DEFAULTS: dict[str, Any] = {
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
}


def extra(group: Mapping[str, Any], name: str) -> Any:
    """One of these options in a group."""
    return group[name] if name in group else DEFAULTS[name]


def not_default(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of these options that are not at their defaults; a tensor, which can be filled later, never is."""
    return {name: v for name, v in options.items() if isinstance(v, torch.Tensor) or v != DEFAULTS[name]}


def check_extras(options: Mapping[str, Any]) -> None:
    """ValueError for a value that makes no sense, in the words of torch's own errors; TypeError for what is no number.

    In a constructor, and in the first step after one of these has been set in a group.
    """
    for name in ("l1", "noise"):
        if not _C.is_number(options[name]):
            raise TypeError(f"{name} must be a number, not a {type(options[name]).__name__}: {options[name]!r}")
        checks.stock_option(name, options[name])
    for name in _FLAGS:
        if name in options and not _C.is_number(options[name]):
            raise TypeError(f"{name} must be True or False, not a {type(options[name]).__name__}: {options[name]!r}")
    checks.seed(options["seed"])
    limit, clearing, decay = options["max_grad_norm"], options["zero_grad"], options["ema_decay"]
    if limit is not None and not (_is_number(limit) and limit > 0):
        raise ValueError(f"Invalid max_grad_norm value: {limit!r} (a number above 0, or None not to clip)")
    if decay is not None and not (_is_number(decay) and 0 <= decay < 1):
        raise ValueError(f"Invalid ema_decay value: {decay!r} (a number in [0, 1), or None for no average)")
    if options["ema_warmup"] and decay is None:
        raise ValueError("ema_warmup=True is about the average of the parameters: give ema_decay too")
    if clearing not in (None, "in_step"):
        raise ValueError(f"Invalid zero_grad value: {clearing!r} ('in_step', or None to leave gradients as they are)")
    if options["error_if_nonfinite"] and limit is None:
        raise ValueError("error_if_nonfinite=True is about the norm of the gradients: give max_grad_norm too")
    if options["error_if_nonfinite"] and options["skip_nonfinite"]:
        raise ValueError("error_if_nonfinite=True and skip_nonfinite=True: a step either raises or is left out")
    if options["precision"] not in PRECISIONS:
        raise ValueError(f"Invalid precision value: {options['precision']!r} ({', '.join(map(repr, PRECISIONS))})")
    acting = ("max_grad_norm", "zero_grad", "ema_decay", "state_dtype", "precision", "cautious")
    differentiable = options.get("differentiable", False)  # Adafactor has no such option
    if differentiable and options.get("fused"):
        raise RuntimeError("`fused` does not support `differentiable`")
    for name in (*acting, "cautious_weight_decay", "stats") if differentiable else ():
        if (value := options[name]) != DEFAULTS[name]:
            raise ValueError(f"{name}={value!r} does not go with differentiable=True: it acts without a graph")


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def defaults_of(class_name: str, rule: str, given: Mapping[str, Any], others: Iterable[str] = ()) -> dict[str, Any]:
    """The defaults of an optimizer that torch does not have; errors are as those of torch's constructors."""
    known = {"lr", "weight_decay", *STOCK_DEFAULTS, *others, *(key for key, _ in places_of(rule))}
    for name in given.keys() - known:
        raise TypeError(f"{class_name}.__init__() got an unexpected keyword argument {name!r}")
    for name in given.keys() & _NOT_NEGATIVE:
        checks.stock_option(name, given[name])
    betas = sum(key == "betas" for key, _ in places_of(rule))
    if "betas" in given and len(given["betas"]) != betas:
        raise ValueError(f"Invalid betas: {given['betas']} ({class_name} has {betas})")
    return {"weight_decay": 0.0, **STOCK_DEFAULTS, **given}


@functools.cache
def places_of(rule: str) -> tuple[tuple[str, int], ...]:
    """Where each option of a rule is in a group: "betas.1" is element 1 of "betas"; -1 stands for the value itself."""
    parts = [name.partition(".") for name in _C.rules()[rule].options]
    return tuple((key, int(element) if element else -1) for key, _, element in parts)


def option_at(group: Mapping[str, Any], place: tuple[str, int]) -> Any:
    """An option of a rule, in a group."""
    key, element = place
    value = extra(group, key) if key in DEFAULTS else group[key]
    return value if element < 0 else value[element]


def snapshot(group: Mapping[str, Any], rule: str) -> dict[str, Any]:
    """A group as the plan reads it, whatever containers its user has put it in."""
    copy = {key: group[key] for key in group}
    copy["params"] = list(group["params"])
    for key, element in places_of(rule):
        if element >= 0 and isinstance(copy.get(key), Iterable):
            copy[key] = tuple(copy[key])
    return copy


def show_options(init: Any, defaults: Mapping[str, Any]) -> None:
    """Lets `inspect.signature` show the options that a constructor takes by ``**``, one by one."""
    signature, types = inspect.signature(init), {**PlainOptions.__annotations__, **AdamExtras.__annotations__}
    shown = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    for name, default in defaults.items():
        if name in signature.parameters:
            continue
        kind, type_ = inspect.Parameter.KEYWORD_ONLY, types.get(name, Any)
        shown.append(inspect.Parameter(name, kind, default=default, annotation=type_))
    init.__signature__ = signature.replace(parameters=shown)
