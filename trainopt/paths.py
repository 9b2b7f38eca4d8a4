"""Which way an optimizer, a loss or a clipping goes: trainopt's own code, or torch's; and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import trainopt.clip
from trainopt import switches
from trainopt._extension import _C
from trainopt.losses import dispatch
from trainopt.optim.explain import Explanation, ParameterPath, kernel, outline
from trainopt.optim.explain import explain as explain_optimizer

CLIPPING = ("clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "get_total_norm")
FORCED = "TRAINOPT_REFERENCE is set"


class Paths(tuple[ParameterPath, ...]):
    """A `ParameterPath` for each loss, or for one clipping. Prints itself, a line each."""

    __slots__ = ()

    def __str__(self) -> str:
        return "\n".join(map(str, self))

    __repr__ = __str__


def explain(subject: Any, *inputs: Any) -> Explanation | Paths:
    """Tells whether trainopt's own code or torch's does the work, and why.

        trainopt.explain(optimizer)                                    # for each of its parameters
        trainopt.explain(loss, output, target)                         # for each loss that is computed
        trainopt.explain(trainopt.clip_grad_norm_, model.parameters())

    Args:
        subject: an optimizer, a loss (a module or any function), or a function that clips.
        *inputs: of the loss or the clipping. They are computed on, once, and left as they are. Without them ordinary
            tensors are assumed, and a loss must be one of trainopt's or torch's, or a module that holds some.

    Returns:
        A tuple of `ParameterPath`, which prints itself.

    Raises:
        TypeError: the subject is neither, or it takes inputs to tell.
    """
    if isinstance(subject, torch.optim.Optimizer) or hasattr(subject, "param_groups"):
        return explain_optimizer(subject)
    if not callable(subject):
        raise TypeError(f"explain takes an optimizer, a loss or a clipping function, not a {type(subject).__name__}")
    if getattr(subject, "__name__", "") in CLIPPING:
        return Paths([explain_clipping(subject, *inputs)])
    if inputs:
        return Paths(explain_calls(subject, inputs))
    if rows := list(explain_parts(subject)):
        return Paths(rows)
    raise TypeError(f"{name_of(subject)} is none of trainopt's or torch's losses: give its inputs too")


def explain_clipping(function: Callable[..., Any], tensors: Any = ()) -> ParameterPath:
    """The path of a clipping, or of a norm of tensors."""
    name = name_of(function)
    given: list[Tensor] = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    what = f"{len(given)} tensor{'s' * (len(given) != 1)}" if given else "ordinary tensors"
    if function is not getattr(trainopt.clip, name, None):
        return ParameterPath(name, "torch", "it is torch's own", what)
    if switches.REFERENCE_FORCED:
        return ParameterPath(name, "torch", FORCED, what)
    of_gradients = function is not trainopt.clip.get_total_norm
    if given and _C.norm_of(given, 2.0, of_gradients) is None:
        why = "tensors that the compiled module does not take: sparse, subclasses, several devices, or without a kernel"
        return ParameterPath(name, "torch", why, what)
    return ParameterPath(name, kernel(next((tensor.device.type for tensor in given), "cpu")), "", what)


class Calls(TorchFunctionMode):
    """While it is entered, the calls of losses are noted, with what they gave."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Callable[..., Any], list[Tensor], Any]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from trainopt.training.criterion.counting import name_of_function

        result = function(*args, **(kwargs or {}))
        if name_of_function(function) is not None:
            given = [*args, *(kwargs or {}).values()]
            self.found.append((function, [tensor for tensor in given if isinstance(tensor, Tensor)], result))
        return result


def explain_calls(function: Callable[..., Any], inputs: Iterable[Any]) -> list[ParameterPath]:
    """The path of each loss that a function computes of these inputs."""
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        calls = Calls()
        with calls:
            function(*(own_leaf(value, has_gradient=index == 0) for index, value in enumerate(inputs)))
    rows = []
    for called, tensors, result in calls.found:
        name, what = called.__name__, ", ".join(map(outline, tensors[:2]))
        if not called.__module__.startswith("trainopt"):
            rows.append(ParameterPath(name, "torch", "it is torch's own", what))
            continue
        made = result[0] if isinstance(result, tuple) else result
        is_ours = "trainopt" in getattr(made.grad_fn, "name", lambda: "")()
        why = FORCED if dispatch.REFERENCE_FORCED else "tensors that the operators do not take"
        path = kernel(tensors[0].device.type) if is_ours else "torch"
        rows.append(ParameterPath(name, path, "" if is_ours else why, what))
    return rows or [ParameterPath(name_of(function), "torch", "it calls no loss of trainopt's or torch's", "")]


def explain_parts(subject: Any) -> Iterable[ParameterPath]:
    """The path that ordinary tensors take in each loss that a module or a function holds."""
    from trainopt.training.criterion.callables import (  # not above: `import trainopt` does not take the loop along
        bare,
        walk,
    )
    from trainopt.training.criterion.counting import name_of_function, name_of_module

    for path, part in walk(subject):
        part = bare(part) if isinstance(part, nn.Module) else part
        things = part.named_modules() if isinstance(part, nn.Module) else [("", part)]
        for inner, thing in things:
            is_module = isinstance(thing, nn.Module)
            if (name_of_module(thing) if is_module else name_of_function(thing)) is None:
                continue
            place = ".".join(filter(None, (path, inner)))
            name = f"{place} ({name_of(thing)})" if place else name_of(thing)
            is_ours = (type(thing) if is_module else thing).__module__.startswith("trainopt")
            reason = ("" if not dispatch.REFERENCE_FORCED else FORCED) if is_ours else "it is torch's own"
            yield ParameterPath(name, "torch" if reason else kernel("cpu"), reason, "ordinary tensors")


def own_leaf(value: Any, has_gradient: bool) -> Any:
    """An input of which a loss may be computed without a trace: a copy, which waits for a gradient where it should."""
    if isinstance(value, tuple | list):
        return type(value)([own_leaf(each, has_gradient) for each in value])
    if not isinstance(value, Tensor):
        return value
    copied = value.detach().clone()
    can_have = copied.is_floating_point() or copied.is_complex()
    return copied.requires_grad_() if can_have and (has_gradient or value.requires_grad) else copied


def name_of(thing: Any) -> str:
    return getattr(thing, "__name__", type(thing).__name__)
