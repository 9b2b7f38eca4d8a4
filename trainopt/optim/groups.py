"""Parameter groups for weight decay, and for learning rates by depth."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from trainopt.checks import number
from trainopt.optim.depth import scales


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


# Which parameters weight decay does no good, by their place, their shape and their names ------------------------------

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
# A class of somebody else's that says it is one: RMSNorm, LlamaRMSNorm, LayerNorm2d, FrozenBatchNorm2d.
NORM_NAME = re.compile(r"Norm(\dd)?$")
# In these a weight with all but one size 1 is a weight all the same: a convolution with one output is (1, n, 1, 1).
WEIGHT_LAYERS = (
    nn.Linear,
    nn.Bilinear,
    nn.modules.conv._ConvNd,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
)
# cls_token, class_token, register_tokens, reg_token, dist_token, mask_token, registers.
TOKEN_NAME = re.compile(r"(^|_)((cls|class|regs?|registers?|dist|distill|distillation|mask)_tokens?|registers?|cls)$")


def spares(model: nn.Module) -> Callable[[str, nn.Parameter], bool]:
    """Tells of a parameter, by one of its names and itself, whether it gets no weight decay by default."""
    modules = dict(model.named_modules(remove_duplicate=False))
    named = list(_named_by_models(modules))

    def spare(name: str, param: nn.Parameter) -> bool:
        owner, own_name = _place_of(modules, name)
        return (
            param.ndim < 2
            or "bias" in own_name.split("_")
            or isinstance(owner, NORMS)
            or NORM_NAME.search(type(owner).__name__) is not None
            or (param.ndim > 2 and param.numel() == max(param.shape) and not isinstance(owner, WEIGHT_LAYERS))
            or (TOKEN_NAME.search(own_name) is not None and not isinstance(owner, WEIGHT_LAYERS))
            or (isinstance(owner, nn.Embedding) and name.rpartition(".")[0].endswith(("_token", "_tokens")))
            or _is_magnitude(modules, name)
            or any(matches(name) for matches in named)
        )

    return spare


def _place_of(modules: dict[str, nn.Module], name: str) -> tuple[nn.Module, str]:
    """The module that a parameter belongs to, and its name there; of a parametrized tensor, the tensor's."""
    path, _, own_name = name.rpartition(".")
    if isinstance(modules[path], ParametrizationList):
        parametrized, _, own_name = path.rpartition(".")
        path = parametrized.removesuffix("parametrizations").removesuffix(".")
    return modules[path], own_name


def _is_magnitude(modules: dict[str, nn.Module], name: str) -> bool:
    """Whether this is the g of a weight that weight normalisation has split into g and v."""
    path, _, own_name = name.rpartition(".")
    owner = modules[path]
    if isinstance(owner, ParametrizationList):
        return own_name == "original0" and type(owner[0]).__name__ == "_WeightNorm"
    return own_name.endswith("_g") and own_name.removesuffix("g") + "v" in owner._parameters


def _named_by_models(modules: dict[str, nn.Module]) -> Iterable[Callable[[str], bool]]:
    """What methods no_weight_decay() name: parameters by their names in the module, or by patterns for these. Swin's
    no_weight_decay_keywords() are parts of names."""
    for path, module in modules.items():
        start = f"{path}." if path else ""
        for pattern in _said(module, "no_weight_decay"):
            yield lambda name, pattern=start + pattern: fnmatchcase(name, pattern)  # type: ignore[misc]
        for word in _said(module, "no_weight_decay_keywords"):
            yield lambda name, start=start, word=word: (  # type: ignore[misc]
                name.startswith(start) and word in name.removeprefix(start)
            )


def _said(module: nn.Module, method: str) -> Iterable[str]:
    said: Any = getattr(module, method, ())
    said = said() if callable(said) else said
    return [said] if isinstance(said, str) else said
