"""The losses in plain torch: what trainopt adds to torch's own, for the tensors that its operators do not take.

They hold for whatever torch can differentiate, batch or trace: other devices, complex numbers, vmap, jvp, subclasses.
"""

import math
from typing import Any

import torch
from torch import Tensor

from trainopt.losses.options import CrossEntropyOptions, has_only_torch_options, with_ignore_index
from trainopt.originals import functional as F

_HALVES = (torch.bfloat16, torch.float16)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: CrossEntropyOptions,
) -> Any:
    """trainopt.functional.cross_entropy in plain torch: the loss, with z_loss the pair of it and its z-loss."""
    reduction, ignore_index, label_smoothing, z_loss, softcap, empty, temperature = options
    if has_only_torch_options(options):
        return F.cross_entropy(input, target, weight, None, ignore_index, None, reduction, label_smoothing)
    # As the operators do: float32 inside, whatever the logits are.
    halves = input.dtype in _HALVES
    logits = input.float() if halves else input
    if halves and weight is not None:
        weight = weight.float()
    if softcap is not None:
        logits = _capped(logits, softcap)
    if temperature != 1:
        logits = logits / temperature
    loss = F.cross_entropy(logits, target, weight, None, ignore_index, None, reduction, label_smoothing)
    counted = _counted_rows(logits, target, ignore_index)
    losses = [loss]
    if z_loss != 0:
        z = z_loss * _log_sum_exp(logits).square().where(counted, 0)
        if reduction != "none":
            z = z.sum() if reduction == "sum" else z.sum() / counted.sum()
        losses = [loss + z, z.detach()]
    if empty == "zero" and reduction == "mean":
        losses = [value.where(counted.any(), 0) for value in losses]
    if halves:
        losses = [value.to(input.dtype) for value in losses]
    return tuple(losses) if z_loss != 0 else losses[0]


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    options: CrossEntropyOptions,
    out_dtype: torch.dtype | None,
) -> Any:
    """trainopt.functional.linear_cross_entropy in plain torch, over logits that are stored; returns as above.

    What torch.nn.functional.linear_cross_entropy computes and refuses, of which torch 2.12 has none.
    """
    logits = _logits(input, linear_weight, target, linear_bias, options.ignore_index)
    if out_dtype is not None and logits.dtype in _HALVES:
        logits = logits.float()
        weight = weight if weight is None else weight.float()
    losses = cross_entropy(logits, target, weight, with_ignore_index(options))
    if out_dtype is None:
        return losses
    return tuple(loss.to(out_dtype) for loss in losses) if options.z_loss != 0 else losses.to(out_dtype)


def _logits(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, ignore_index: int | None
) -> Tensor:
    """linear(input, linear_weight, linear_bias), (N, C, d1, …), or torch's error for operands that do not fit."""
    if input.dim() < 1 or input.dim() > 2:
        raise RuntimeError(f"expected input with dimensionality 1 or 2, got {input.dim()}")
    if linear_weight.dim() < 2:
        raise RuntimeError(f"expected linear_weight with dimensionality at least 2, got {linear_weight.dim()}")
    classes, *others, features = linear_weight.shape
    if input.shape[-1] != features:
        raise RuntimeError(
            "expected equal input and linear_weight last dimensions (in_features), "
            f"got {input.shape[-1]} and {features}, respectively"
        )
    if linear_bias is not None and tuple(linear_bias.shape) != (classes, *others):
        raise RuntimeError(f"expected linear_bias shape {(classes, *others)}, got {tuple(linear_bias.shape)}")
    if others and input.dim() == 1:
        raise RuntimeError(
            f"K-dimensional loss defined by linear_weight shape {tuple(linear_weight.shape)} requires"
            f" batched input, (N, {features}), got unbatched"
            f" input with shape {tuple(input.shape)}"
        )
    shape = (*input.shape[:-1], classes, *others)
    if target.shape == shape and ignore_index is not None:
        raise RuntimeError("ignore_index cannot be specified when target contains probabilities")
    if others:
        rows = math.prod(others, start=classes)
        linear_weight = linear_weight.reshape(rows, features)
        linear_bias = None if linear_bias is None else linear_bias.reshape(rows)
    return F.linear(input, linear_weight, linear_bias).reshape(shape)


def _class_dim(logits: Tensor) -> int:
    return 0 if logits.dim() == 1 else 1


def _capped(logits: Tensor, softcap: float) -> Tensor:
    """softcap·tanh(logits / softcap), or what comes of it where the logits' dtype has no such number as the cap."""
    if logits.is_floating_point():
        numbers = torch.finfo(logits.dtype)
        if softcap > numbers.max:
            return logits
        softcap = max(softcap, numbers.tiny)
    return softcap * torch.tanh(logits / softcap)


def _log_sum_exp(logits: Tensor) -> Tensor:
    """torch.logsumexp over the classes, with a gradient that has all its digits.

    torch's is exp(x − lse), and where logits are large lse has no digits left for what is beyond the largest one.
    """
    dim = _class_dim(logits)
    if logits.shape[dim] == 0:
        return logits.logsumexp(dim)
    peak = logits.detach().amax(dim, keepdim=True)
    peak = peak.where(peak.isfinite(), 0)
    return peak.squeeze(dim) + (logits - peak).logsumexp(dim)


def _counted_rows(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Which rows of logits the mean counts, in the shape of the rows."""
    if target.is_floating_point():
        return torch.ones_like(logits.select(_class_dim(logits), 0), dtype=torch.bool)
    return target != ignore_index
