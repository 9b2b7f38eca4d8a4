"""Which parameters of a model weight decay does no good, by their place, their shape and their names."""

import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

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
