"""The dtypes of an optimizer's states (``state_dtype``): in which new ones are made, and ways from one to another."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from trainopt.optim import code8, precision
from trainopt.optim.options import extra

#: What a state can be stored in, whatever its parameter's dtype; by name, for files and command lines. "8bit" is uint8
#: codes, with scales beside them.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "8bit": torch.uint8}

#: States in which small steps must not be lost: weights of their own, where a parameter began, sums so long that a step
#: changes their last digits alone; and those of a row's or a column's one number, of which fewer bits would save
#: nothing. They are float32 where one dtype is given for all states, or where the parameter has more than its own 16
#: bits.
AS_PRECISE = frozenset({"z", "p0", "s", "row_var", "col_var"})


def dtype_of(group: Mapping[str, Any], name: str, param: Tensor) -> torch.dtype:
    """The dtype that a group calls for in a state of a parameter's."""
    chosen = _chosen(group, name)
    if chosen is None:
        is_wider = precision.of(group, param) != "native"
        return torch.float32 if is_wider and name in AS_PRECISE else param.dtype
    dtype: torch.dtype = DTYPES[chosen] if isinstance(chosen, str) else chosen
    is_small = dtype is torch.uint8 and param.numel() < code8.LEAST_ELEMENTS
    return torch.float32 if is_small else dtype


def are_apart(group: Mapping[str, Any], param: Tensor) -> bool:
    """Whether a group's states may have another dtype than their parameter."""
    return extra(group, "state_dtype") is not None or precision.of(group, param) != "native"


def uses_codes(group: Mapping[str, Any]) -> bool:
    """Whether a group asks for states in 8 bits."""
    chosen = extra(group, "state_dtype")
    return any(
        dtype in ("8bit", torch.uint8) for dtype in (chosen.values() if isinstance(chosen, Mapping) else [chosen])
    )


def has_codes(state: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Whether one of these states is in 8 bits."""
    return any(name + code8.SUFFIX in state for name in names)


def _chosen(group: Mapping[str, Any], name: str) -> Any:
    chosen = extra(group, "state_dtype")
    if isinstance(chosen, Mapping):
        return chosen.get(name)
    return "float32" if chosen is not None and name in AS_PRECISE else chosen


def check(chosen: Any, states: Iterable[str]) -> None:
    """ValueError for a choice that makes no sense for these states."""
    names = tuple(states)
    parts = chosen if isinstance(chosen, Mapping) else {name: chosen for name in names or ("",)}
    for name, dtype in parts.items():
        if name not in names and isinstance(chosen, Mapping):
            raise ValueError(f"Invalid state_dtype: there is no state {name!r} ({', '.join(map(repr, names))})")
        is_known = dtype in DTYPES if isinstance(dtype, str) else dtype in DTYPES.values()
        if not is_known and dtype is not None:
            raise ValueError(
                f"Invalid state_dtype value: {dtype!r} ({', '.join(map(repr, DTYPES))}, or the torch.dtype)"
            )
        if name in AS_PRECISE and isinstance(chosen, Mapping) and dtype not in (None, "float32", torch.float32):
            raise ValueError(f"Invalid state_dtype of {name!r}: {dtype!r} (its small steps would be lost: 'float32')")


def check_params(group: Mapping[str, Any]) -> None:
    """ValueError for a group with a choice that makes no sense for its parameters."""
    chosen = extra(group, "state_dtype")
    for param in group["params"] if chosen is not None else ():
        if param.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"state_dtype={chosen!r} is for parameters of float32, bfloat16, float16, and one is {param.dtype}: put"
                " it in a group with state_dtype=None"
            )
        if uses_codes(group) and param.numel() >= code8.LEAST_ELEMENTS and not code8.can_be_shared(param):
            raise ValueError(
                f"state_dtype={chosen!r}: one parameter is a DTensor of shape {tuple(param.shape)} with the placements"
                f" {param.placements}, whose shards do not consist of whole blocks of {code8.BLOCK} elements: they do"  # type: ignore[attr-defined]
                f" where the first dimension alone is spread, and the others have a multiple of {code8.BLOCK} elements"
                " together. Put it in a group with state_dtype='bfloat16'"
            )


def start(
    state: dict[str, Any], group: Mapping[str, Any], param: Tensor, name: str, value: float, is_unsigned: bool
) -> None:
    """Makes a state, with this number in all its elements."""
    dtype = dtype_of(group, name, param)
    if dtype is torch.uint8 and value == 0:
        state[name], state[name + code8.SUFFIX] = code8.zeros_like(param)
        return
    filling = complex(value, value) if dtype.is_complex else value
    wide = torch.float32 if dtype is torch.uint8 else dtype
    made = torch.full_like(param, filling, dtype=wide, memory_format=torch.preserve_format)
    if dtype is torch.uint8:
        state[name], state[name + code8.SUFFIX] = code8.encode(made, is_unsigned)
    else:
        state[name] = made


def start_as_copy(state: dict[str, Any], group: Mapping[str, Any], param: Tensor, name: str) -> None:
    """Makes a state that begins as the parameter."""
    dtype = dtype_of(group, name, param)
    state[name] = param.detach().to(dtype, copy=True, memory_format=torch.preserve_format)


def keys_of(names: Iterable[str]) -> Iterator[str]:
    """The keys that these states can have in a state dict."""
    for name in names:
        yield name
        yield name + code8.SUFFIX


def cast_states(optimizer: Any, state: dict[str, Any], group: Mapping[str, Any], param: Tensor, step: int = 0) -> None:
    """Brings a parameter's states into the dtypes that its group calls for, rounded to nearest, or as in a step.

    ValueError for codes without their scales, or with scales for another number of elements.
    """
    for name in optimizer._states:
        value = state.get(name)
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            continue
        dtype, is_unsigned = dtype_of(group, name, param), name in optimizer._unsigned
        if value.dtype is dtype is torch.uint8:
            code8.scale_of(state, name)
        elif value.dtype is torch.uint8:
            wide = code8.decode(value.detach(), code8.scale_of(state, name), is_unsigned)
            state[name] = wide.to(dtype)
            del state[name + code8.SUFFIX]
        elif dtype is torch.uint8 and value.is_floating_point():
            state[name], state[name + code8.SUFFIX] = code8.encode(
                value.detach().float(), is_unsigned, code8.rounding_at(step)
            )
        elif value.is_floating_point():
            state[name] = value.detach().to(dtype)
