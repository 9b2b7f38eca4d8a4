"""The losses as functions: torch.nn.functional's, with one pass forward and one backward.

Signatures, results, warnings and errors are torch's. A tensor that the operators do not take (another device, a
subclass, a function transform, an integer) goes through torch's own function in the same call.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function, has_torch_function_variadic

from trainopt._extension import _C
from trainopt.losses import dispatch, reference
from trainopt.losses.arguments import (
    is_number,
    legacy_reduction,
    number_of,
    warn_of_broadcasting,
    warn_of_mean,
)
from trainopt.losses.dispatch import alike, fits, is_only_a_mode, is_pair, overridden, pointwise_loss
from trainopt.losses.linear import linear_cross_entropy
from trainopt.losses.options import CrossEntropyOptions, check
from trainopt.originals import functional as F

__all__ = [
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "check_targets",
    "cross_entropy",
    "huber_loss",
    "kl_div",
    "l1_loss",
    "linear_cross_entropy",
    "mse_loss",
    "smooth_l1_loss",
]


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    return_z_loss: bool = False,
    softcap: float | None = None,
    inplace_backward: bool = False,
    empty: str = "nan",
    temperature: float = 1.0,
) -> Any:  # a pair with return_z_loss: a union would ask every caller which
    """Cross-entropy of logits against classes or probabilities: torch.nn.functional.cross_entropy, and more.

    With x the logits of a row, lse = log Σ exp(x) and y its class, the loss is weight[y]·(lse − x[y]); the rest of the
    formula, with smoothing and probabilities, is torch.nn.CrossEntropyLoss's. Forward keeps each row's lse, as its
    largest logit and what is beyond it; backward makes the gradient from the logits in one pass.

    Args:
        input: logits, (C), (N, C) or (N, C, d1, …), with any strides.
        target: classes (int64 or uint8) in input's shape without C, or probabilities in input's shape. Probabilities
            are not checked to be a distribution, as in torch.
        weight: a factor for each class, (C).
        size_average, reduce: deprecated, as in torch.
        ignore_index: rows of this class count for nothing.
        reduction: "none", "mean" (over the weights of the rows that count) or "sum".
        label_smoothing: the share of the target that is spread evenly over all classes, 0 to 1 (Szegedy et al. 2016,
            arXiv:1512.00567).
        z_loss: adds z_loss·lse² to each row that counts, 0 or more; unweighted, and averaged over the number of rows
            that count (PaLM, Chowdhery et al. 2022, arXiv:2204.02311, uses 1e-4).
        return_z_loss: return (loss, the part of it that is z-loss, without a gradient).
        softcap: replaces x by softcap·tanh(x / softcap), greater than 0 (Gemma 2, arXiv:2408.00118, uses 30).
        inplace_backward: permits backward to write the gradient over the logits' memory, which then saves one tensor of
            their size. Autograd refuses to use the logits afterwards, as after any operation in place.
        empty: "nan" or "zero": the mean where no row counts. The gradient is 0 in either case.
        temperature: divides x, greater than 0, after the softcap (distillation, Hinton et al. 2015, arXiv:1503.02531;
            policies that are sampled with a temperature). lse, and with it z_loss, are those of the divided logits.

    Raises:
        IndexError: a class out of range, with its value and position; on a GPU at the next call, see check_targets.
        ValueError: shapes that do not match, or an option out of its range.
    """
    is_overridden = has_torch_function_variadic(input, target, weight)
    if is_overridden and is_only_a_mode(input, target, weight):
        return handle_torch_function(
            cross_entropy,
            (input, target, weight),
            input,
            target,
            weight,
            size_average,
            ignore_index,
            reduce,
            reduction,
            label_smoothing,
            z_loss=z_loss,
            return_z_loss=return_z_loss,
            softcap=softcap,
            inplace_backward=inplace_backward,
            empty=empty,
            temperature=temperature,
        )
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce)
    options = CrossEntropyOptions(reduction, ignore_index, label_smoothing, z_loss, softcap, empty, temperature)
    if z_loss != 0 or softcap is not None or empty != "nan" or temperature != 1:
        check(options)
    result = None
    if not is_overridden and is_number(label_smoothing) and 0 <= label_smoothing <= 1:
        result = dispatch.cross_entropy(input, target, weight, options, bool(inplace_backward))
    if result is None:
        result = reference.cross_entropy(input, target, weight, options)
    if not return_z_loss:
        return result[0] if z_loss else result
    return result if z_loss else (result, torch.zeros_like(result))


def check_targets() -> None:
    """Raises if a loss on a GPU has met what it does not take since the last check.

    IndexError for a class out of range in cross_entropy or linear_cross_entropy; RuntimeError for an input or a target
    of binary_cross_entropy outside of [0, 1].

    On a GPU nothing waits to see the values: the loss of such a row or element is NaN, so is the gradient of such a
    row, nothing is read by the class, and the next call of one of these losses on that device raises, as does this
    function. It looks at what the GPUs have done so far: call it after something that waits for them, such as
    loss.item(). On the CPU the loss itself raises.
    """
    _C.check_targets()


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """Squared error (input − target)²: torch.nn.functional.mse_loss, whose arguments these are.

    input and target broadcast, with torch's warning. With a weight, torch's own function computes the loss.
    """
    if has_torch_function_variadic(input, target, weight):
        return overridden(mse_loss, F.mse_loss, input, target, size_average, reduce, reduction, weight)
    if weight is not None:
        return F.mse_loss(input, target, size_average, reduce, reduction, weight)  # type: ignore[call-arg]
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce)
    input, target = _broadcast(input, target)
    loss = pointwise_loss("mse_loss", input, target, None, None, number_of(reduction))
    return F.mse_loss(input, target, reduction=reduction) if loss is None else loss


def l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """Absolute error |input − target|, with gradient 0 where it is 0: torch.nn.functional.l1_loss.

    input and target broadcast, with torch's warning. With a weight, torch's own function computes the loss.
    """
    if has_torch_function_variadic(input, target, weight):
        return overridden(l1_loss, F.l1_loss, input, target, size_average, reduce, reduction, weight)
    if weight is not None:
        return F.l1_loss(input, target, size_average, reduce, reduction, weight)  # type: ignore[call-arg]
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce)
    input, target = _broadcast(input, target)
    loss = pointwise_loss("l1_loss", input, target, None, None, number_of(reduction))
    return F.l1_loss(input, target, reduction=reduction) if loss is None else loss


def smooth_l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
) -> Tensor:
    """½d²/beta where |d| < beta, else |d| − ½beta, of d = input − target: torch.nn.functional.smooth_l1_loss.

    beta = 0 is l1_loss (Girshick 2015, arXiv:1504.08083, has beta = 1). input and target broadcast, with torch's
    warning.
    """
    if has_torch_function_variadic(input, target):
        return overridden(smooth_l1_loss, F.smooth_l1_loss, input, target, size_average, reduce, reduction, beta)
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce)
    input, target = _broadcast(input, target)
    loss = None
    if is_number(beta) and beta >= 0:
        name = "smooth_l1_loss" if beta else "l1_loss"
        loss = pointwise_loss(name, input, target, None, None, number_of(reduction), beta)
    return F.smooth_l1_loss(input, target, reduction=reduction, beta=beta) if loss is None else loss


def huber_loss(
    input: Tensor, target: Tensor, reduction: str = "mean", delta: float = 1.0, weight: Tensor | None = None
) -> Tensor:
    """½d² where |d| < delta, else delta·(|d| − ½delta), of d = input − target: torch.nn.functional.huber_loss.

    Huber 1964, doi:10.1214/aoms/1177703732. input and target broadcast, with torch's warning. With a weight, torch's
    own function computes the loss.
    """
    if has_torch_function_variadic(input, target, weight):
        return overridden(huber_loss, F.huber_loss, input, target, reduction, delta, weight)
    if weight is not None:
        return F.huber_loss(input, target, reduction, delta, weight)  # type: ignore[call-arg]
    input, target = _broadcast(input, target)
    loss = None
    if is_number(delta) and delta > 0 and alike(input, target):
        loss = pointwise_loss("huber_loss", input, target, None, None, number_of(reduction), delta)
    return F.huber_loss(input, target, reduction, delta) if loss is None else loss


def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """−weight·(target·log(input) + (1 − target)·log(1 − input)): torch.nn.functional.binary_cross_entropy.

    As in torch the logarithms are at least −100, an input or a target outside of [0, 1] is a RuntimeError, on a GPU at
    the next call (see check_targets), and target must have input's shape. weight broadcasts to it.
    """
    if has_torch_function_variadic(input, target, weight):
        return overridden(
            binary_cross_entropy, F.binary_cross_entropy, input, target, weight, size_average, reduce, reduction
        )
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce)
    loss = None
    if alike(input, target) and fits(weight, input):
        loss = pointwise_loss("binary_cross_entropy", input, target, weight, None, number_of(reduction))
    return F.binary_cross_entropy(input, target, weight, reduction=reduction) if loss is None else loss


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    """binary_cross_entropy of sigmoid(input), safe for large logits: torch.nn.functional's function of that name.

    pos_weight multiplies the term of target, for classes that are rare; target must have input's shape, and weight and
    pos_weight broadcast to it.
    """
    if has_torch_function_variadic(input, target, weight, pos_weight):
        return overridden(
            binary_cross_entropy_with_logits,
            F.binary_cross_entropy_with_logits,
            input,
            target,
            weight,
            size_average,
            reduce,
            reduction,
            pos_weight,
        )
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce)
    if alike(input, target) and fits(weight, input) and fits(pos_weight, input):
        name = "binary_cross_entropy_with_logits"
        loss = pointwise_loss(name, input, target, weight, pos_weight, number_of(reduction))
        if loss is not None:
            return loss
    return F.binary_cross_entropy_with_logits(input, target, weight, reduction=reduction, pos_weight=pos_weight)


def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor:
    """target·(log(target) − input), 0 where target is 0, of log-probabilities input: torch.nn.functional.kl_div.

    With log_target, exp(target)·(target − input) (Kullback & Leibler 1951, doi:10.1214/aoms/1177729694). "batchmean"
    divides the sum by input's first dimension; "mean", by all elements, has torch's warning. input and target
    broadcast.
    """
    if has_torch_function_variadic(input, target):
        return overridden(kl_div, F.kl_div, input, target, size_average, reduce, reduction, log_target)
    is_deprecated = size_average is not None or reduce is not None
    if is_deprecated and is_compiling():  # a compiler cannot trace how torch reads these
        reduction, size_average, reduce = legacy_reduction(size_average, reduce), None, None
    if size_average is None and reduce is None and is_pair(input, target) and isinstance(log_target, bool):
        number = number_of("sum" if reduction == "batchmean" else reduction)
        loss = pointwise_loss("kl_div_log_target" if log_target else "kl_div", input, target, None, None, number)
        if loss is not None:
            if reduction == "mean" and not is_deprecated:
                warn_of_mean()
            return loss / input.size(0) if reduction == "batchmean" and input.dim() != 0 else loss
    return F.kl_div(input, target, size_average, reduce, reduction, log_target)


def _broadcast(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one shape, with torch's warning if they have two, in the name of the caller's caller."""
    if target.size() == input.size():
        return input, target
    warn_of_broadcasting(input, target)
    expanded_input, expanded_target = torch.broadcast_tensors(input, target)
    return expanded_input, expanded_target


# torch.jit.script compiles a function's Python, which ours is not made for: a scripted program calls torch's.
for _name in __all__:
    if hasattr(F, _name):
        vars()[_name].__prepare_scriptable__ = partial(getattr, F, _name)
