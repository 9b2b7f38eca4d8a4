"""Parameter groups for weight decay, and for learning rates by depth."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from trainopt.checks import number
from trainopt.optim.depth import scales
from trainopt.optim.undecayed import spares


def param_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    no_decay: Sequence[str] = (),
    layer_decay: float | None = None,
    lr: float | None = None,
) -> list[dict[str, Any]]:
    """The parameters of a model in two groups: those that weight decay is good for, and those that it is not.

        optimizer = trainopt.AdamW(trainopt.param_groups(model, weight_decay=0.1), lr=3e-4)

    A decay of 0 is given to biases, to the parameters of normalisation layers (by their type, or in the shape of one,
    such as (1, n, 1, 1), outside linear, convolutional and embedding layers), to whatever has fewer than two
    dimensions, to class, register and other tokens by their names, to the magnitudes that weight normalisation has made
    of a weight, and to what a method ``no_weight_decay()`` of the model or a module in it names (timm's convention).
    Every parameter of `model.parameters()` is there exactly once, tied ones under their first name, and with its name,
    as torch's optimizers take them. Frozen ones (``requires_grad=False``) are there too: without a gradient they are
    not stepped, and to unfreeze one needs no new group.

    Args:
        model: any module whose parameters have their shapes.
        weight_decay: of the first group, at least 0.
        no_decay: names of further parameters that get no decay, such as "*.embedding.weight": shell patterns.
        layer_decay: greater than 0 and at most 1, such as 0.75 for fine-tuning: the learning rate falls by this factor
            from each layer to the one below it, and there are two groups for each layer, from the input up. The top
            (head and last norm) has the full rate, embeddings the lowest. Layers are what the model's
            ``group_matcher()`` says (timm's models), else the members of its ModuleLists and Sequentials, the outermost
            ones; what is registered before them is below, what comes after is above. None (default): one rate for all.
        lr: the rate at the top, with layer_decay. Then each group has its "lr", for any optimizer and any scheduler.
            Without it trainopt's optimizers work it out from their own; for other optimizers each group has timm's
            "lr_scale", which timm's schedulers and `trainopt.Schedule` apply.

    Returns:
        Groups for any torch optimizer, the decayed one first; a group that would be empty is left out.

    Raises:
        ValueError: a number out of its range, a pattern that no name matches, a lazy parameter that has no shape yet,
            a model without parameters, an lr without layer_decay, or with layer_decay a model without layers.
    """
    number(param_groups, "weight_decay", weight_decay)
    if layer_decay is not None:
        number(param_groups, "layer_decay", layer_decay, above=0, to=1)
    if lr is not None:
        number(param_groups, "lr", lr)
        if layer_decay is None:
            raise ValueError(f"param_groups: lr={lr!r} is for layer_decay; without it, give it to the optimizer")
    if isinstance(no_decay, str):
        raise ValueError(f"param_groups: no_decay must be a list of patterns, got {no_decay!r}")
    unmatched = set(no_decay)
    first_names: dict[nn.Parameter, str] = {}
    spared: set[nn.Parameter] = set()
    spares_by_default = spares(model)
    for name, param in _every_parameter(model):
        if is_lazy(param):
            raise ValueError(f"param_groups: {name!r} has no shape yet; run the model on a batch first")
        first_names.setdefault(param, name)
        matching = {pattern for pattern in no_decay if fnmatchcase(name, pattern)}
        unmatched -= matching
        if matching or spares_by_default(name, param):
            spared.add(param)
    if unmatched:
        raise ValueError(f"param_groups: no_decay={sorted(unmatched)[0]!r} matches no parameter of the model")
    if not first_names:
        raise ValueError(f"param_groups: model {type(model).__name__} has no parameters")

    depths = {} if layer_decay is None else scales(model, layer_decay)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for layer in sorted({layer for layer, _ in depths.values()} or {0}):
        for is_spared in (False, True):
            groups[layer, is_spared] = {"params": [], "weight_decay": 0.0 if is_spared else weight_decay}
    for param, name in first_names.items():
        layer, scale = depths.get(name, (0, 1.0))
        group = groups[layer, param in spared]
        group["params"].append((name, param))
        if depths:
            group.update({"layer": layer, "lr_scale": scale} if lr is None else {"lr": lr * scale})
    return [group for group in groups.values() if group["params"]]


def _every_parameter(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter), under every name that it has."""
    return model.named_parameters(remove_duplicate=False)
