"""What a loss counts: the weight of a micro-batch among others.

A mean over micro-batches of unequal size is not the mean of their means. With c_i what the loss counts in the i-th,

    mean over all = sum_i c_i · mean_i / sum_i c_i

so the gradient of the one big batch is the sum of the micro-batches' gradients, each times c_i / sum c.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Count = int | float | Tensor

#: Functions whose mean leaves out targets of -100 unless told otherwise.
IGNORING = ("cross_entropy", "nll_loss", "linear_cross_entropy")


def default_count(loss: Callable[..., Any]) -> Callable[[Any], Count]:
    """How many a loss counts in a target.

    For a loss with an `ignore_index` (torch's and trainopt's CrossEntropyLoss and NLLLoss and their functions, also
    under functools.partial) and integer targets: those that are not ignored; with class weights, the sum of their
    weights. For any other, the samples: the length of the target. ValueError if its reduction is not the mean.
    """
    keywords = (
        loss.keywords
        if isinstance(loss, functools.partial)
        else vars(loss)
        if isinstance(loss, torch.nn.Module)
        else {}
    )
    reduction = keywords.get("reduction", "mean")
    if reduction != "mean":
        raise ValueError(f"the loss has reduction {reduction!r}; it must be 'mean', over what it counts")
    function = loss.func if isinstance(loss, functools.partial) else loss
    if "ignore_index" not in keywords and getattr(function, "__name__", "") not in IGNORING:
        return samples_in
    ignored = keywords.get("ignore_index")
    if ignored is None:  # torch's own default where the loss is linear_cross_entropy
        ignored = -100
    weight = keywords.get("weight")
    if weight is None and isinstance(loss, torch.nn.Module):
        weight = getattr(loss, "weight", None)

    def count(target: Any) -> Count:
        if not isinstance(target, Tensor) or target.is_floating_point():
            return samples_in(target)
        counted = target != ignored
        if weight is not None:
            return on_host(weight.to(target.device, torch.float64)[target[counted]].sum())
        return on_host(counted.sum())

    return count


def count_by_shape(count: Callable[[Any], Count], targets: Tensor) -> Callable[[Any], Count]:
    """The same counts for parts of `targets`, from their shape alone where nothing in them is ignored or weighted."""
    whole = count(targets)
    for size in {len(targets), targets.numel()}:
        if not isinstance(whole, float) and int(whole) == size:
            each = size // len(targets)
            return lambda target: target.size(0) * each
    return count


def on_host(count: Tensor) -> Count:
    """A number where reading it costs no waiting, else the tensor."""
    return count.item() if count.device.type == "cpu" else count


def samples_in(tree: Any) -> int:
    """The length of the first tensor in a target or a batch: samples, by torch's convention."""
    while not isinstance(tree, Tensor):
        if isinstance(tree, dict):
            tree = tuple(tree.values())
        if not isinstance(tree, (list, tuple)) or not tree:
            return 1
        tree = tree[0]
    return tree.size(0) if tree.ndim else 1


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
    """Whether anything is counted, as far as that is known without waiting."""
    return isinstance(count, Tensor) or count > 0


def add_weighted(total: Tensor, mean: Tensor, count: Count) -> None:
    """total += count · mean on the device; what counts nothing adds nothing, also where its mean is 0/0."""
    if isinstance(count, Tensor):
        total += torch.where(count > 0, mean.detach() * count, 0.0)
    elif count:
        total.add_(mean.detach(), alpha=count)
