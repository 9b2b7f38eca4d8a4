"""What a callable is made of: what stands under its wrappers, and the modules and parameters that it reaches.

A loss may be a module, a function, a method, a partial, a closure, or any of these compiled. What it counts and what it
owns are properties of the thing itself, and none of the wrappers.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

#: Methods that do what calling the module does.
CALLS = ("forward", "__call__", "_wrapped_call_impl", "_call_impl")
LIBRARIES = ("torch", "trainopt")
LONGEST, DEEPEST = 64, 12  # entries of a container, and steps from the callable, that are looked at


class Core(NamedTuple):
    """A callable without its wrappers."""

    function: Any  # a module or a function
    keywords: dict[str, Any]  # that partials have bound
    is_compiled: bool  # torch.compile stands round it: no one sees what happens inside
    is_whole: bool  # no positional argument is bound


def inside(module: nn.Module) -> nn.Module | None:
    """The module under torch.compile, DistributedDataParallel or DataParallel; None where it is none of them."""
    if isinstance(module, DistributedDataParallel | DataParallel):
        return module.module
    return module._orig_mod if type(module).__name__ == "OptimizedModule" else None  # type: ignore[return-value]


def bare(module: nn.Module) -> nn.Module:
    """The person's own module under all such wrappers."""
    while (inner := inside(module)) is not None:
        module = inner
    return module


def core_of(function: Any) -> Core:
    """A callable without the wrappers that pass its arguments on: partials, compilation, a module's own methods."""
    keywords: dict[str, Any] = {}
    is_compiled, is_whole = has_compiled(function), True
    while True:
        if isinstance(function, functools.partial):
            keywords, is_whole = {**function.keywords, **keywords}, is_whole and not function.args
            function = function.func
        elif is_call_of_module(function):
            function = function.__self__
        elif isinstance(function, nn.Module):
            if (inner := inside(function)) is None:
                return Core(function, keywords, is_compiled, is_whole)
            function = inner
        elif (original := compiled_from(function)) is not None:
            function = original
        else:
            return Core(function, keywords, is_compiled, is_whole)


def has_compiled(thing: Any) -> bool:
    """Whether torch.compile has a part in a callable: nothing that happens in there can be watched."""
    for _, part in walk(thing):
        if isinstance(part, nn.Module):
            if any(is_compiled(module) for module in (part, *part.modules())):
                return True
        elif compiled_from(part) is not None and not getattr(part, "_torchdynamo_disable", False):
            return True
    return False


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is compiled, by torch.compile or in place."""
    return type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None


def is_call_of_module(function: Any) -> bool:
    """Whether a callable is a module's `forward`, or its `__call__`."""
    is_method = isinstance(function, types.MethodType) and isinstance(function.__self__, nn.Module)
    return is_method and function.__name__ in CALLS


def compiled_from(function: Any) -> Any:
    """The function that torch.compile was given; None where this is not its work."""
    is_function = isinstance(function, types.FunctionType)
    return vars(function).get("_torchdynamo_orig_callable") if is_function else None


def reached(function: Any) -> Iterator[tuple[str, nn.Module | nn.Parameter]]:
    """The modules and parameters that a callable reaches, each once, with the names that they have there."""
    for name, part in walk(function):
        if isinstance(part, nn.Module | nn.Parameter):
            yield name or type(part).__name__, part


def walk(thing: Any, name: str = "", seen: set[int] | None = None, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """A callable and all that it reaches, each once, by name.

    It goes into partials, methods, closures, default values, the globals that a function names, attributes of callable
    objects, and containers; a module is not gone into, for what is registered belongs to it.
    """
    seen = set() if seen is None else seen
    if id(thing) in seen or depth > DEEPEST:
        return
    seen.add(id(thing))
    yield name, thing
    if isinstance(thing, nn.Module | nn.Parameter):
        return
    for key, part in parts_of(thing):
        yield from walk(part, f"{name}.{key}" if name and key else name or key, seen, depth + 1)


def parts_of(thing: Any) -> list[tuple[str, Any]]:
    """What a callable or a container holds, by name; nothing for anything else."""
    if isinstance(thing, functools.partial):
        return [("", thing.func), *numbered(thing.args), *thing.keywords.items()]
    if isinstance(thing, types.MethodType):
        return [("", thing.__self__), ("", thing.__func__)]
    if (original := compiled_from(thing)) is not None:
        return [("", original)]
    if isinstance(thing, types.FunctionType):
        return [] if is_of_library(thing) else [*variables_of(thing).items()]
    if isinstance(thing, dict):
        return [(str(key), value) for key, value in thing.items()] if len(thing) <= LONGEST else []
    if isinstance(thing, list | tuple | set | frozenset):
        return numbered(thing) if len(thing) <= LONGEST else []
    if callable(thing) and hasattr(thing, "__dict__") and not isinstance(thing, type | types.ModuleType | torch.Tensor):
        return [*vars(thing).items()]
    return []


def numbered(values: Any) -> list[tuple[str, Any]]:
    return [(str(index), value) for index, value in enumerate(values)]


def is_of_library(function: Any) -> bool:
    """Whether a function is torch's or trainopt's own, which holds nothing of the person's."""
    return (getattr(function, "__module__", None) or "").partition(".")[0] in LIBRARIES


def variables_of(function: types.FunctionType) -> dict[str, Any]:
    """The values of the variables from outside that a function names: of its closure, its defaults and its globals."""
    names = names_in(function.__code__)
    found = {name: function.__globals__[name] for name in names if name in function.__globals__}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # it is not set yet
            continue
    arguments = function.__code__.co_varnames[: function.__code__.co_argcount]
    defaults = function.__defaults__ or ()
    found |= dict(zip(arguments[len(arguments) - len(defaults) :], defaults, strict=True))
    return found | (function.__kwdefaults__ or {})


def names_in(code: types.CodeType) -> list[str]:
    """The global names and attributes in a function's code, that of nested functions and comprehensions too."""
    nested = (
        name for constant in code.co_consts if isinstance(constant, types.CodeType) for name in names_in(constant)
    )
    return [*code.co_names, *nested]


def rebound(thing: Any, owned: set[int], memo: dict[int, Any]) -> Any:
    """A callable that does the same on copies, for `copy.deepcopy`, which takes functions for atoms.

    Args:
        owned: the ids of the modules and parameters to be copied; everything else stays shared.
        memo: of the deep copy; what is copied already is taken from it.
    """
    if id(thing) in memo:
        return memo[id(thing)]
    if isinstance(thing, nn.Module | nn.Parameter):
        own = bare(thing) if isinstance(thing, nn.Module) else thing
        return copy.deepcopy(own, memo) if id(own) in owned or id(own) in memo else thing
    parts = parts_of(thing)
    if not parts:
        return thing
    memo[id(thing)] = thing  # for what holds itself
    copies = [(key, rebound(part, owned, memo)) for key, part in parts]
    if all(new is part for (_, new), (_, part) in zip(copies, parts, strict=True)):
        return thing
    memo[id(thing)] = made = remade(thing, copies)
    return made


def remade(thing: Any, parts: list[tuple[str, Any]]) -> Any:
    """The same callable or container of other parts, which are as `parts_of` gives them."""
    values = [part for _, part in parts]
    if isinstance(thing, functools.partial):
        bound = len(thing.args)
        return functools.partial(values[0], *values[1 : 1 + bound], **dict(parts[1 + bound :]))
    if isinstance(thing, types.MethodType):
        return types.MethodType(values[1], values[0])
    if compiled_from(thing) is not None:
        return values[0]
    if isinstance(thing, types.FunctionType):
        variables = dict(parts)
        cells = tuple(
            types.CellType(variables[name]) if name in variables else cell
            for name, cell in zip(thing.__code__.co_freevars, thing.__closure__ or (), strict=True)
        )
        closed = {*thing.__code__.co_freevars, *thing.__code__.co_varnames}
        names = {**thing.__globals__, **{name: part for name, part in variables.items() if name not in closed}}
        arguments = thing.__code__.co_varnames[: thing.__code__.co_argcount]
        defaults = tuple(variables[name] for name in arguments[len(arguments) - len(thing.__defaults__ or ()) :])
        made = types.FunctionType(thing.__code__, names, thing.__name__, defaults or None, cells or None)
        made.__kwdefaults__ = {name: variables[name] for name in thing.__kwdefaults__ or ()} or None
        return made
    if isinstance(thing, dict):
        return type(thing)(zip(thing, values, strict=True))
    if isinstance(thing, list | tuple | set | frozenset):
        return type(thing)(*values) if hasattr(thing, "_fields") else type(thing)(values)
    made = copy.copy(thing)
    vars(made).update(parts)
    return made
