"""How deep in a model its parameters lie, for learning rates that fall towards the input.

Layer-wise decay of the learning rate: Clark et al., ELECTRA, 2020, arXiv:2003.10555; as BEiT and timm have it.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn


def scales(model: nn.Module, layer_decay: float) -> dict[str, tuple[int, float]]:
    """For every name of a parameter its layer, from 0 at the input, and layer_decay ** (layers above it)."""
    layers = layers_of(model)
    top = max(layers.values(), default=0)
    return {name: (layer, float(layer_decay ** (top - layer))) for name, layer in layers.items()}


def apply_depth(group: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Gives a group of `param_groups` that has a "layer" and an "lr_scale" its learning rate, from the optimizer's own.

    timm's groups have an "lr_scale" and no "layer": those are scaled by timm's schedulers, and left to them.
    """
    if "layer" in group and "lr_scale" in group and "lr" not in group:
        group["lr"] = defaults["lr"] * group.pop("lr_scale")


def layers_of(model: nn.Module) -> dict[str, int]:
    """The layer of every parameter's name, numbered from 0 without a gap.

    By `model.group_matcher()`, timm's convention, where the model or a module in it that has all of its parameters has
    one; else by the model's stacks of layers: what is registered before a stack lies below it, what comes after, above.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for prefix, module in model.named_modules():
        matcher = getattr(module, "group_matcher", None)
        if callable(matcher):
            start = f"{prefix}." if prefix else ""
            if all(name.startswith(start) for name in names):
                order = _by_matcher(matcher(coarse=False))
                return _numbered({name: order(name.removeprefix(start)) for name in names})
    return _numbered(_by_stacks(model, names))


# timm's convention ----------------------------------------------------------------------------------------------------

_WITH_THE_GROUP_BEFORE = 99999  # an ordinal of timm's that ends so makes no layer of its own

Ordinal = tuple[float, ...]


def _by_matcher(matcher: Any) -> Callable[[str], Ordinal]:
    """A name's ordinal, by a function, or by a dict of patterns for names, whose groups are numbers."""
    if callable(matcher):

        def called(name: str) -> Ordinal:
            ordinal = matcher(name)
            return tuple(ordinal) if isinstance(ordinal, Iterable) else (ordinal,)

        return called
    patterns: list[tuple[re.Pattern[str], int, tuple[float, ...]]] = []
    for number, several in enumerate(matcher.values()):
        for pattern in several if isinstance(several, (tuple, list)) else [(several, None)]:
            if pattern[0] is not None:
                patterns.append((re.compile(pattern[0]), number, tuple(pattern[1] or ())))

    def matched(name: str) -> Ordinal:
        for pattern, number, suffix in patterns:
            if found := pattern.match(name):
                return (float(number), *(float(part) for part in found.groups() if part is not None), *suffix)
        return (float("inf"),)

    return matched


def _numbered(ordinals: dict[str, Ordinal]) -> dict[str, int]:
    layer, layers = -1, {}
    for ordinal in sorted(set(ordinals.values())):
        if layer < 0 or ordinal[-1] != _WITH_THE_GROUP_BEFORE:
            layer += 1
        layers[ordinal] = layer
    return {name: layers[ordinal] for name, ordinal in ordinals.items()}


# Any other model ------------------------------------------------------------------------------------------------------


def _by_stacks(model: nn.Module, names: list[str]) -> dict[str, Ordinal]:
    """Ordinals by the members of the outermost stacks, in the order of registration."""
    prefixes = [f"{prefix}." if prefix else "" for prefix in _layer_names("", model)]
    if len(prefixes) < 2:
        raise ValueError(
            f"param_groups: layer_decay needs layers to count, and {type(model).__name__} has neither a ModuleList or"
            " Sequential of several, nor a method group_matcher (as timm's models)"
        )
    ordinals: dict[str, Ordinal] = {}
    reached = -1  # the stacks are met in their order; between them, and after the last, come parameters of their own
    for name in names:
        inside = next((i for i, prefix in enumerate(prefixes) if name.startswith(prefix)), None)
        if inside is not None:
            reached = max(reached, inside)
            ordinals[name] = (float(inside),)
        else:
            ordinals[name] = (reached + 0.5,)
    return ordinals


def _layer_names(prefix: str, module: nn.Module) -> list[str]:
    """The names of the layers at or below a module, in order: the members of the stacks that lie in no other stack."""
    children = [(f"{prefix}.{name}" if prefix else name, child) for name, child in module.named_children()]
    if not is_stack(module):
        return [name for child_name, child in children for name in _layer_names(child_name, child)]
    members = [(name, child) for name, child in children if has_parameters(child)]
    if isinstance(module, nn.Sequential) and any(is_stack(child, len(members) + 1) for _, child in members):
        # A model put together as Sequential(embedding, Sequential(*blocks), head): the longer stack is the model's.
        return [
            name
            for child_name, child in members
            for name in (_layer_names(child_name, child) if is_stack(child) else [child_name])
        ]
    return [name for name, _ in members]


def is_stack(module: nn.Module, least: int = 2) -> bool:
    """Whether this is a ModuleList or Sequential in which so many members have parameters."""
    return isinstance(module, (nn.ModuleList, nn.Sequential)) and sum(map(has_parameters, module)) >= least


def has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None
