"""What a loss counts: the weight of a micro-batch among others.

A mean over micro-batches of unequal size is not the mean of their means. With c_i what the loss counts in the i-th,

    mean over all = sum_i c_i · mean_i / sum_i c_i

so the gradient of the one big batch is the sum of the micro-batches' gradients, each times c_i / sum c.
"""

from __future__ import annotations

import functools
import inspect
import math
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import _reduction

from trainopt.training.criterion.callables import Core, core_of

Count = int | float | Tensor

# Losses by name -------------------------------------------------------------------------------------------------------


def of_labels(arguments: Mapping[str, Any]) -> Count:
    """Those that are not `ignore_index`; with class weights the sum of theirs. Of probabilities, the rows."""
    target = arguments["target"]
    if not isinstance(target, Tensor):
        return samples_in(target)
    if target.is_floating_point():
        classes = target.size(min(target.ndim - 1, 1)) if target.ndim else 1
        return target.numel() // max(classes, 1)
    ignored = arguments.get("ignore_index")
    ignored = -100 if ignored is None else ignored
    is_known = ignored >= torch.iinfo(target.dtype).min and ignored <= torch.iinfo(target.dtype).max
    counted = target != ignored if is_known else None
    weight = arguments.get("weight")
    if weight is None:
        return target.numel() if counted is None else on_host(counted.sum())
    weights = weight.detach().to(target.device, widest(target.device))[target.long().clamp(0, len(weight) - 1)]
    return on_host((weights if counted is None else torch.where(counted, weights, 0.0)).sum())


def of_elements(arguments: Mapping[str, Any]) -> Count:
    """The elements of what input and target are broadcast to."""
    given = arguments.get("input", arguments.get("input1"))
    target = arguments["target"]
    if not isinstance(given, Tensor):
        return elements_in(target)
    if not isinstance(target, Tensor) or given.shape == target.shape:
        return given.numel()
    return math.prod(torch.broadcast_shapes(given.shape, target.shape))


def of_weighted_elements(arguments: Mapping[str, Any]) -> Count:
    """As mse_loss and l1_loss divide: by the sum of the elements' weights, where there are any."""
    weight = arguments.get("weight")
    return of_elements(arguments) if weight is None else on_host(weight.detach().sum())


def of_rows(arguments: Mapping[str, Any]) -> Count:
    """The first dimension, where there is a second."""
    given = arguments.get("input")
    if not isinstance(given, Tensor):
        return samples_in(arguments["target"])
    return given.size(0) if given.ndim > 1 else 1


def of_vectors(arguments: Mapping[str, Any]) -> Count:
    """All that is in front of the last dimension."""
    given = arguments.get("input", arguments.get("anchor", arguments.get("target")))
    return math.prod(given.shape[:-1]) if isinstance(given, Tensor) else samples_in(given)


def of_targets(arguments: Mapping[str, Any]) -> Count:
    return elements_in(arguments["target"])


def of_sequences(arguments: Mapping[str, Any]) -> Count:
    """The second dimension of ctc_loss's log_probs: each sequence's loss is divided by its length first."""
    log_probs = arguments["log_probs"]
    return log_probs.size(1) if log_probs.ndim == 3 else 1


#: Attributes of the losses that are modules, and arguments of those that are functions.
OPTIONS = ("weight", "ignore_index", "reduction", "return_z_loss")
LABELED = ("cross_entropy", "nll_loss", "linear_cross_entropy")  # whose targets are classes, or probabilities of them
#: What the mean of each of torch's losses, and of trainopt's of the same name, is over.
COUNTED: dict[str, Callable[[Mapping[str, Any]], Count]] = {
    **dict.fromkeys(LABELED, of_labels),
    **dict.fromkeys(("mse_loss", "l1_loss"), of_weighted_elements),
    **dict.fromkeys(("smooth_l1_loss", "huber_loss", "binary_cross_entropy"), of_elements),
    **dict.fromkeys(("binary_cross_entropy_with_logits", "kl_div", "poisson_nll_loss"), of_elements),
    **dict.fromkeys(("gaussian_nll_loss", "soft_margin_loss", "hinge_embedding_loss"), of_elements),
    "margin_ranking_loss": of_elements,
    **dict.fromkeys(("multi_margin_loss", "multilabel_margin_loss"), of_rows),
    **dict.fromkeys(("multilabel_soft_margin_loss", "triplet_margin_loss"), of_vectors),
    "triplet_margin_with_distance_loss": of_vectors,
    "cosine_embedding_loss": of_targets,
    "ctc_loss": of_sequences,
}
MODULES = {
    "CrossEntropyLoss": "cross_entropy",
    "NLLLoss": "nll_loss",
    "LinearCrossEntropyLoss": "linear_cross_entropy",
    "MSELoss": "mse_loss",
    "L1Loss": "l1_loss",
    "SmoothL1Loss": "smooth_l1_loss",
    "HuberLoss": "huber_loss",
    "BCELoss": "binary_cross_entropy",
    "BCEWithLogitsLoss": "binary_cross_entropy_with_logits",
    "KLDivLoss": "kl_div",
    "PoissonNLLLoss": "poisson_nll_loss",
    "SoftMarginLoss": "soft_margin_loss",
    "HingeEmbeddingLoss": "hinge_embedding_loss",
    "MultiMarginLoss": "multi_margin_loss",
    "MultiLabelMarginLoss": "multilabel_margin_loss",
    "MultiLabelSoftMarginLoss": "multilabel_soft_margin_loss",
}


def name_of_function(function: Any) -> str | None:
    """The name of a loss that is a function of torch's or trainopt's, wherever it has been put; None for any other."""
    module, name = getattr(function, "__module__", None), getattr(function, "__name__", None)
    is_theirs = module == "torch.nn.functional" or (isinstance(module, str) and module.startswith("trainopt.losses"))
    return name if is_theirs and name in COUNTED else None


def name_of_module(module: nn.Module) -> str | None:
    """The function that a loss module of torch's or trainopt's is; None for one that computes something of its own."""
    if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
        return None
    owner = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    is_theirs = owner.__module__ == "torch.nn.modules.loss" or owner.__module__.startswith("trainopt.losses")
    return MODULES.get(owner.__name__) if is_theirs else None


def reduction_of(arguments: Mapping[str, Any]) -> str:
    """The reduction that a loss's arguments ask for, the deprecated ones first, as in torch."""
    average, reduce = arguments.get("size_average"), arguments.get("reduce")
    if average is None and reduce is None:
        return arguments.get("reduction", "mean")
    return _reduction.legacy_get_string(average, reduce, emit_warning=False)


def counted(name: str, arguments: Mapping[str, Any]) -> Count | None:
    """What the loss of this name counts in its arguments; None where it does not reduce to a mean."""
    reduction = reduction_of(arguments)
    if reduction == "batchmean" and name == "kl_div":
        return of_first_dimension(arguments)
    return COUNTED[name](arguments) if reduction == "mean" else None


def of_first_dimension(arguments: Mapping[str, Any]) -> Count:
    """Of kl_div's batchmean."""
    given = arguments.get("input")
    return given.size(0) if isinstance(given, Tensor) and given.ndim else samples_in(arguments["target"])


@functools.cache
def signature_of(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


def arguments_of(
    function: Callable[..., Any], positional: Iterable[Any], keywords: Mapping[str, Any]
) -> dict[str, Any]:
    """A call's arguments by name, defaults too."""
    bound = signature_of(function).bind(*positional, **keywords)
    bound.apply_defaults()
    return bound.arguments


def known_loss(core: Core) -> tuple[str, dict[str, Any]] | None:
    """The name and the options of a loss that is torch's or trainopt's; None for any other."""
    function, name = core.function, None
    if isinstance(function, torch.jit.ScriptModule):
        name = MODULES.get(function.original_name) if hasattr(function, "reduction") else None  # a trace has no options
    elif isinstance(function, nn.Module):
        name = name_of_module(function)
    elif core.is_whole and isinstance(function, types.FunctionType):
        name = name_of_function(function)
        if name is not None:
            parameters = signature_of(function).parameters.values()
            defaults = {each.name: each.default for each in parameters if each.default is not each.empty}
            return name, {**defaults, **core.keywords}
    if name is None or core.keywords:
        return None
    return name, {option: getattr(function, option) for option in OPTIONS if hasattr(function, option)}


def check(name: str, options: Mapping[str, Any]) -> None:
    """ValueError for a loss that does not give one mean."""
    reduction = reduction_of(options)
    if reduction != "mean" and (name, reduction) != ("kl_div", "batchmean"):
        raise ValueError(f"the loss has reduction {reduction!r}; it must be 'mean', over what it counts")
    if options.get("return_z_loss"):
        raise ValueError("the loss has return_z_loss=True, and so returns a pair; it must return the loss alone")


def count_in(known: tuple[str, Mapping[str, Any]], target: Any) -> Count:
    """What a known loss counts in a target."""
    name, options = known
    count = counted(name, {**options, "target": target})
    return samples_in(target) if count is None else count


def default_count(loss: Callable[..., Any]) -> Callable[[Any], Count]:
    """How many a loss counts in a target, as far as it can be told from the loss itself.

    For torch's losses and trainopt's, whatever stands round them: what its mean is over; of classes those that are not
    its `ignore_index`, and with class weights the sum of theirs. For any other, the samples: the length of the target.
    ValueError if its reduction is not the mean.
    """
    known = known_loss(core_of(loss))
    if known is None:
        return samples_in
    check(*known)
    return functools.partial(count_in, known)


# Counts ---------------------------------------------------------------------------------------------------------------


def on_host(count: Tensor) -> Count:
    """A number where reading it costs no waiting, else the tensor."""
    return count.item() if count.device.type == "cpu" else count


def first_tensor(tree: Any) -> Tensor | None:
    """The first tensor of nested mappings, lists and tuples."""
    while not isinstance(tree, Tensor):
        if isinstance(tree, tuple | list):
            tree = tree[0] if tree else None
        elif isinstance(tree, Mapping):
            tree = next(iter(tree.values()), None)
        else:
            return None
    return tree


def samples_in(tree: Any) -> int:
    """The length of the first tensor in a target or a batch: samples, by torch's convention."""
    tensor = first_tensor(tree)
    return tensor.size(0) if tensor is not None and tensor.ndim else 1


def elements_in(tree: Any) -> int:
    """The elements of the first tensor in a target."""
    tensor = first_tensor(tree)
    return 1 if tensor is None else tensor.numel()


def widest(device: torch.device) -> torch.dtype:
    """What sums are kept in: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def weight_of(count: Count, total: Count) -> float | Tensor:
    """c_i / sum c; 0 where nothing is counted."""
    if isinstance(count, Tensor) or isinstance(total, Tensor):
        total = torch.as_tensor(total)
        return torch.where(total > 0, count / total, 0.0)
    return count / total if total else 0.0


def is_counted(count: Count) -> bool:
    """Whether anything is counted, as far as that is known without waiting. NaN, which a class weight may be, counts:
    then the loss is not finite, and that is found and told."""
    return isinstance(count, Tensor) or not count <= 0


def add_weighted(total: Tensor, mean: Tensor, count: Count) -> None:
    """total += count · mean on the device; what counts nothing adds nothing, also where its mean is 0/0."""
    if isinstance(count, Tensor):
        total += torch.where(count > 0, mean.detach() * count, 0.0)
    elif count:
        total.add_(mean.detach(), alpha=count)
