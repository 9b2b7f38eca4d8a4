"""How 16-bit parameters are stored (``precision``): with what they lack of a float32 beside them, or rounded at random.

The state "master" is what a parameter lacks: the lower 16 bits of a float32 whose upper ones are the bfloat16, as an
int16 that is added to its bits; the next 8 of them, as an int8; or beside a float16 a float32 of its own. csrc/core/
master.h is what the engine does; this is the same in plain torch, bit for bit.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trainopt._extension import _C
from trainopt.optim.distributed import by_element, like
from trainopt.optim.options import PRECISIONS, extra

#: Its key in a parameter's state.
KEY = "master"

_HALVES = (torch.bfloat16, torch.float16)
#: What can be beside a parameter of each dtype.
_MASTERS = {torch.bfloat16: (torch.int16, torch.int8), torch.float16: (torch.float32,)}


def of(group: Mapping[str, Any], param: Tensor) -> str:
    """How a parameter of a group is stored: "native" for one that is not of 16 bits."""
    return extra(group, "precision") if param.dtype in _HALVES else "native"


def check_params(group: Mapping[str, Any]) -> None:
    """ValueError for a group with a choice that there is none of, or that makes no sense for its parameters."""
    chosen = extra(group, "precision")
    if chosen not in PRECISIONS:
        raise ValueError(f"Invalid precision value: {chosen!r} ({', '.join(map(repr, PRECISIONS))})")
    for param in group["params"] if chosen == "master24" else ():
        if param.dtype is torch.float16:
            raise ValueError(
                "precision='master24' is for bfloat16 parameters, and one is torch.float16: use precision='master'"
            )


def is_random(group: Mapping[str, Any], param: Tensor) -> bool:
    """Whether the step of a parameter takes random numbers, which are keyed by the count of its steps."""
    return extra(group, "noise") != 0 or of(group, param) == "stochastic"


def has_master(group: Mapping[str, Any], param: Tensor) -> bool:
    """Whether a parameter is stored with something beside it that completes it."""
    return of(group, param) in ("master", "master24")


def lacks_master(group: Mapping[str, Any], param: Tensor, state: Mapping[str, Any]) -> bool:
    """Whether a parameter's state is still to be given what completes the parameter."""
    return has_master(group, param) and state.get(KEY) is None


def new_master(group: Mapping[str, Any], param: Tensor) -> Tensor:
    """What completes a parameter to the float32 number that it is itself."""
    if param.dtype is torch.float16:
        return param.detach().to(torch.float32, memory_format=torch.preserve_format)
    dtype = torch.int16 if of(group, param) == "master" else torch.int8
    return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)


def value_of(param: Tensor, state: Mapping[str, Any]) -> Tensor:
    """A 16-bit parameter in float32, with what its state has beside it, if that is of its dtype and shape."""
    own, master = param.detach(), state.get(KEY)
    fits = isinstance(master, Tensor) and master.shape == own.shape and master.dtype in _MASTERS.get(own.dtype, ())
    if not fits or not isinstance(master, Tensor):
        return own.to(torch.float32, copy=True, memory_format=torch.preserve_format)
    return by_element(_completed, own, master)[0]


def _completed(own: Tensor, master: Tensor) -> tuple[Tensor]:
    if master.dtype is torch.float32:
        return (torch.where(master.to(own.dtype) == own, master, own.float()),)
    upper = own.view(torch.int16).int() * 65536
    rest = master.int() * (256 if master.dtype is torch.int8 else 1)
    magnitude = upper & 0x7FFFFFFF
    beyond = ((magnitude == 0) & (rest < 0)) | ((magnitude == 0x7F800000) & (rest > 0))
    return ((upper + torch.where(beyond, 0, rest)).view(torch.float32),)


@torch.no_grad()
def store_(
    param: Tensor, value: Tensor, group: Mapping[str, Any], state: dict[str, Any], index: int, of_step: float = 0
) -> None:
    """Stores a float32 value as its group says, in the parameter and in its state.

    Args:
        index, of_step: of the parameter in the optimizer, and of its step, which random numbers are keyed by.
    """
    chosen = of(group, param)
    if chosen == "stochastic":
        value = _round_at_random(param, value, extra(group, "seed"), int(of_step), index)
    if not has_master(group, param):
        state.pop(KEY, None)
    elif param.dtype is torch.bfloat16:
        value, state[KEY] = by_element(_split16 if chosen == "master" else _split24, value)
    else:
        state[KEY] = value.clone()
    param.copy_(value)


def _split16(value: Tensor) -> tuple[Tensor, Tensor]:
    bits, nan = value.view(torch.int32), value.isnan()
    upper = torch.where(nan, bits >> 16 | 0x40, bits + 0x8000 >> 16)
    return upper.short().view(torch.bfloat16), torch.where(nan, 0, bits - (upper << 16)).short()


def _split24(value: Tensor) -> tuple[Tensor, Tensor]:
    bits, nan = value.view(torch.int32), value.isnan()
    rounded = bits + 0x80 >> 8
    upper = torch.where(nan, bits >> 16 | 0x40, rounded + 0x80 >> 8)
    return upper.short().view(torch.bfloat16), torch.where(nan, 0, rounded - (upper << 8)).to(torch.int8)


def _round_at_random(param: Tensor, value: Tensor, seed: int, step: int, index: int) -> Tensor:
    """Values that the parameter's dtype holds, up in magnitude with the probability of how far they are on the way."""
    random = torch.empty(param.shape, dtype=torch.int16)
    _C.rounding_bits_(random, seed, step, index)
    random = like(random.to(param.device).int() & 0xFFFF, param)
    bits = value.view(torch.int32)
    if param.dtype is torch.bfloat16:
        return torch.where(value.isfinite(), bits + random & -65536, bits).view(torch.float32)
    magnitude, random = value.abs(), random >> 3
    # A subnormal number is a whole count of 2^-24.
    count = (magnitude * 2.0**24 + random * 2.0**-13).trunc() * 2.0**-24
    normal = (magnitude.view(torch.int32) + random & -8192).view(torch.float32)
    rounded = torch.where(magnitude < 2.0**-14, count, normal)
    return torch.where(value.isfinite(), rounded.copysign(value), value)
