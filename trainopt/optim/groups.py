"""Parameter groups for weight decay."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from trainopt.checks import number

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)


def param_groups(model: nn.Module, weight_decay: float, *, no_decay: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The parameters of a model in two groups: those that weight decay is good for, and those that it is not.

        optimizer = trainopt.AdamW(trainopt.param_groups(model, weight_decay=0.1), lr=3e-4)

    Biases, the parameters of normalisation layers, and whatever has fewer than two dimensions get a decay of 0. Every
    parameter of `model.parameters()` is there exactly once, tied ones under their first name, and with its name, as
    torch's optimizers take them. Frozen ones (``requires_grad=False``) are there too: without a gradient they are not
    stepped, and to unfreeze one needs no new group.

    Args:
        model: any module whose parameters have their shapes.
        weight_decay: of the first group, at least 0.
        no_decay: names of further parameters that get no decay, such as "*.embedding.weight": shell patterns.

    Returns:
        Groups for any torch optimizer, the decayed one first; a group that would be empty is left out.

    Raises:
        ValueError: a weight_decay that is negative or no number, a pattern that no name matches, a lazy parameter that
            has no shape yet, or a model without parameters.
    """
    number(param_groups, "weight_decay", weight_decay)
    if isinstance(no_decay, str):
        raise ValueError(f"param_groups: no_decay must be a list of patterns, got {no_decay!r}")
    unmatched = set(no_decay)
    first_names: dict[nn.Parameter, str] = {}
    spared: set[nn.Parameter] = set()
    for name, module, own_name, param in _every_parameter(model):
        if nn.parameter.is_lazy(param):
            raise ValueError(f"param_groups: {name!r} has no shape yet; run the model on a batch first")
        first_names.setdefault(param, name)
        matching = {pattern for pattern in no_decay if fnmatchcase(name, pattern)}
        unmatched -= matching
        if matching or param.ndim < 2 or isinstance(module, NORMS) or "bias" in own_name.split("_"):
            spared.add(param)
    if unmatched:
        raise ValueError(f"param_groups: no_decay={sorted(unmatched)[0]!r} matches no parameter of the model")
    if not first_names:
        raise ValueError(f"param_groups: model {type(model).__name__} has no parameters")

    decayed = [(name, param) for param, name in first_names.items() if param not in spared]
    undecayed = [(name, param) for param, name in first_names.items() if param in spared]
    groups = {"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}
    return [group for group in groups if group["params"]]


def _every_parameter(model: nn.Module) -> list[tuple[str, nn.Module, str, torch.nn.Parameter]]:
    """(name, module, name in the module, parameter), under every name that it has."""
    return [
        (f"{prefix}.{own_name}" if prefix else own_name, module, own_name, param)
        for prefix, module in model.named_modules(remove_duplicate=False)
        for own_name, param in module.named_parameters(recurse=False, remove_duplicate=False)
    ]
