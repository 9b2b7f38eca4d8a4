"""The losses in plain torch: what trainopt adds to torch's own, for the tensors that its operators do not take.

They hold for whatever torch can differentiate, batch or trace: other devices, complex numbers, vmap, jvp, subclasses.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_HALVES = (torch.bfloat16, torch.float16)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    empty: str,
) -> Any:
    """trainopt.functional.cross_entropy in plain torch: the loss, with z_loss the pair of it and its z-loss."""
    if z_loss == 0 and softcap is None and empty == "nan":
        return F.cross_entropy(input, target, weight, None, ignore_index, None, reduction, label_smoothing)
    # As the operators do: float32 inside, whatever the logits are.
    halves = input.dtype in _HALVES
    logits = input.float() if halves else input
    if halves and weight is not None:
        weight = weight.float()
    if softcap is not None:
        logits = _capped(logits, softcap)
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
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    empty: str,
) -> Any:
    """trainopt.functional.linear_cross_entropy in plain torch, over logits that are stored; returns as above."""
    logits = F.linear(input, weight, bias)
    shape = logits.shape[:-1]
    by_token = target.reshape(-1, logits.shape[-1]) if target.is_floating_point() else target.reshape(-1)
    losses = cross_entropy(
        logits.reshape(-1, logits.shape[-1]),
        by_token,
        class_weight,
        ignore_index,
        reduction,
        label_smoothing,
        z_loss,
        softcap,
        empty,
    )
    if reduction != "none":
        return losses
    return tuple(value.reshape(shape) for value in losses) if z_loss != 0 else losses.reshape(shape)


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
