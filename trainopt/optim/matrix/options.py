"""The options of Muon's groups: those of torch's Muon, what trainopt has beyond them, and AdamW's for the rest.

A group is Muon's unless it has ``use_muon=False``, as in the groups of Muon's authors. What trainopt has beyond torch
is in a group only where it was given, so that a group that uses none of it is one of torch's.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch

from trainopt import originals
from trainopt._extension import _C
from trainopt.checks import whole
from trainopt.optim.adamw import AdamW

#: Beyond torch's, with their defaults.
EXTRAS: dict[str, Any] = {
    "flatten": False,
    "split": 1,
    "split_dim": 0,
    "normuon_beta2": None,
    "ns_dtype": None,
}
NS_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.bfloat16, torch.float32, torch.float64)}

#: Why nobody can choose the dtype of all states of a Muon.
OWN_DTYPE = (
    "the momentum of Muon's matrices has their own dtype; the states of all other parameters can be converted with"
    " convert_state(optimizer.adamw, …)"
)

#: What a group may carry that no step reads: names, and what schedulers and `trainopt.param_groups` leave there.
_MARKS = ("params", "param_names", "use_muon", "name", "layer", "lr_scale")
_MUON = {*inspect.signature(originals.Muon).parameters, *EXTRAS} - {"params"}
_ADAMW = set(inspect.signature(AdamW).parameters) - {"params"}
_OF_TORCHS_ADAMW = _ADAMW - AdamW.EXTRAS.keys()
#: Options of AdamW's that are about the whole step, in which the matrices have no part, with their defaults.
_WHOLE_STEP = {
    name: inspect.signature(AdamW).parameters[name].default
    for name in (
        *("max_grad_norm", "error_if_nonfinite", "skip_nonfinite", "zero_grad"),
        *("ema_decay", "ema_warmup", "differentiable"),
    )
}


def _original(rows: int, columns: int) -> float:
    return math.sqrt(max(1, rows / columns))


#: What ``adjust_lr_fn`` multiplies the learning rate of a matrix by. torch knows the last from 2.14 on.
RATIOS: dict[str | None, Callable[[int, int], float]] = {
    None: _original,
    "original": _original,
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "spectral_unclamped": lambda rows, columns: math.sqrt(rows / columns),
}


def is_muons(group: Mapping[str, Any]) -> bool:
    """Whether a group is stepped by Muon; else by AdamW."""
    return bool(group.get("use_muon", True))


def extra(group: Mapping[str, Any], name: str) -> Any:
    """One of trainopt's own options in a group of Muon's."""
    return group.get(name, EXTRAS[name])


def is_plain(param: torch.Tensor) -> bool:
    """Whether a parameter is an ordinary tensor, and not of another class, such as DTensor."""
    return type(param) in (torch.Tensor, torch.nn.Parameter)


def torchs_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of torch's Muon with these options, which it has checked in its own words."""
    return dict(originals.Muon([torch.empty(0, 0)], **options).defaults)


def check_group(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """ValueError for an option that is out of its range, unknown, or of the other algorithm.

    Args:
        given: a group as its maker gave it.
        defaults: of its algorithm.
    """
    use_muon = given.get("use_muon", True)
    _check_use_muon(use_muon)
    own, whose, others = (_MUON, "Muon", "AdamW") if use_muon else (_ADAMW, "AdamW", "Muon")
    for name in given:
        if name in own or name in _MARKS or name.startswith("initial_"):
            continue
        if name in _MUON | _ADAMW:
            raise ValueError(f"Muon: {name!r} is an option of {others}, in a group of {whose}'s (use_muon={use_muon})")
        raise ValueError(f"Muon: a group of {whose}'s has no option {name!r}")
    options = {name: value for name, value in {**defaults, **given}.items() if name in own}
    if not use_muon:
        return check_adamw(options)
    torchs_defaults({name: value for name, value in options.items() if name not in EXTRAS})
    check_iteration(options)
    check_extras(options)


def check_present(group: Mapping[str, Any]) -> None:
    """ValueError for a group of a living optimizer with options of the other algorithm, or without its own.

    Schedulers leave options of both in every group; those that only trainopt has would be ignored there.
    """
    use_muon = group.get("use_muon", True)
    _check_use_muon(use_muon)
    own, other, extras = ("Muon", "AdamW", AdamW.EXTRAS) if use_muon else ("AdamW", "Muon", EXTRAS)
    for name in extras.keys() & group.keys():
        if group[name] != extras[name]:
            raise ValueError(
                f"Muon: {name}={group[name]!r} is an option of {other}, in a group of {own}'s (use_muon={use_muon})"
            )
    if not use_muon:
        _check_whole_step(group)
        if missing := _OF_TORCHS_ADAMW - group.keys():
            raise ValueError(
                f"Muon: a group with use_muon=False lacks {min(missing)!r}: add_param_group makes one of AdamW's"
            )


def check_values(group: Mapping[str, Any]) -> None:
    """Raises for options of a group of Muon's that its step cannot be made with: what torch's raises, and TypeError or
    ValueError for trainopt's own."""
    for name in ("lr", "weight_decay", "momentum", "eps"):
        if not _C.is_number(group[name]):
            raise TypeError(f"Muon: {name} must be a number, not a {type(group[name]).__name__}: {group[name]!r}")
    if not isinstance(group["nesterov"], (bool, int)):
        raise TypeError(f"Muon: nesterov must be True or False, not {group['nesterov']!r}")
    check_iteration(group)
    if group["adjust_lr_fn"] not in _ratios_of_torch():
        raise ValueError(f"Adjust learning rate function {group['adjust_lr_fn']} is not supported")
    check_extras(group)


@cache
def _ratios_of_torch() -> tuple[str | None, ...]:
    """Those of the ratios that torch's class knows."""

    def is_known(name: str | None) -> bool:
        try:
            torchs_defaults({"adjust_lr_fn": name})
        except ValueError:
            return False
        return True

    return tuple(filter(is_known, RATIOS))


def check_iteration(group: Mapping[str, Any]) -> None:
    """ValueError where torch's step raises one, and for what is no number of steps."""
    if whole("Muon", "ns_steps", group["ns_steps"]) >= 100:
        raise ValueError("Number of steps must be less than 100 for computational efficiency")
    if not hasattr(group["ns_coefficients"], "__len__") or len(group["ns_coefficients"]) != 3:
        raise ValueError("Coefficients must be a tuple of exactly 3 values")
    if not all(map(_C.is_number, group["ns_coefficients"])):
        raise TypeError(f"Muon: ns_coefficients must be numbers, got {group['ns_coefficients']!r}")


def check_adamw(options: Mapping[str, Any]) -> None:
    """ValueError for options that AdamW refuses, or that do not go with Muon; TypeError for those that it lacks."""
    _check_whole_step(options)
    AdamW([torch.empty(0)], **options)


def _check_whole_step(options: Mapping[str, Any]) -> None:
    for name in _WHOLE_STEP.keys() & options.keys():
        if options[name] != _WHOLE_STEP[name]:
            raise ValueError(f"Muon: {name}={options[name]!r} is about a whole step, and matrices have no part in it")


def _check_use_muon(value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"Muon: use_muon must be True or False, got {value!r}")


def dtype_of(chosen: Any) -> torch.dtype | None:
    """The dtype that ``ns_dtype`` names; ValueError if it is none that the iteration is made in."""
    if chosen is None or chosen in NS_DTYPES.values():
        return chosen
    if chosen not in tuple(NS_DTYPES):
        raise ValueError(f"Invalid ns_dtype value: {chosen!r} ({', '.join(map(repr, NS_DTYPES))}, or None)")
    return NS_DTYPES[chosen]


def check_extras(group: Mapping[str, Any]) -> None:
    """ValueError for options of trainopt's own that are out of their range, or that others of them do not go with."""
    dtype_of(extra(group, "ns_dtype"))
    if not isinstance(flatten := extra(group, "flatten"), bool):
        raise ValueError(f"Invalid flatten value: {flatten!r} (True or False)")
    beta2 = extra(group, "normuon_beta2")
    is_number = isinstance(beta2, (int, float)) and not isinstance(beta2, bool)
    if beta2 is not None and not (is_number and 0 <= beta2 < 1):
        raise ValueError(f"Invalid normuon_beta2 value: {beta2!r} (a number in [0, 1), or None for plain Muon)")
    split, dim = extra(group, "split"), extra(group, "split_dim")
    sizes = split if isinstance(split, (tuple, list)) else [split]
    if not sizes or not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes):
        raise ValueError(f"Invalid split value: {split!r} (a number of blocks, or their sizes in a tuple)")
    if type(dim) is not int or dim not in (0, 1):
        raise ValueError(f"Invalid split_dim value: {dim!r} (0 for blocks of rows, 1 for blocks of columns)")
    if dim == 1 and split == 1:
        raise ValueError("split_dim=1 is about split: give that too")


def check_params(group: Mapping[str, Any]) -> None:
    """ValueError for parameters that do not go with their group's options."""
    if not is_muons(group):
        AdamW([dict(group)])  # which looks at them itself
    for param in group["params"] if is_muons(group) else ():
        check_matrix(param, group)


def check_matrix(param: torch.Tensor, group: Mapping[str, Any]) -> None:
    """ValueError for a parameter of Muon's that is no matrix, or that cannot be split as its group says."""
    if param.ndim != 2 and not (extra(group, "flatten") and param.ndim > 2):
        raise ValueError(f"Muon only supports 2D parameters whereas we found a parameter with size: {param.size()}")
    if extra(group, "split") != 1 and not is_plain(param):  # a part of a shard is no view of the parameter
        raise ValueError(
            f"Muon: split={extra(group, 'split')!r} is for ordinary tensors, not for {type(param).__name__}"
        )
    split, size = extra(group, "split"), param.shape[extra(group, "split_dim")]
    if (sum(split) != size) if isinstance(split, (tuple, list)) else size % split:
        raise ValueError(f"Muon: split={split!r} does not divide a parameter with size: {param.size()}")
