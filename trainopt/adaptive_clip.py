"""Clipping by the size of what is updated: adaptive gradient clipping."""

from collections.abc import Iterable

import torch
from torch import Tensor

from trainopt import checks


@torch.no_grad()
def adaptive_clip_grad_(parameters: Tensor | Iterable[Tensor], clip_factor: float = 0.01, eps: float = 1e-3) -> None:
    """Scales each unit's gradient so that its norm is at most `clip_factor` times the norm of the unit's weights.

    In place. A unit is a row of a matrix, a filter of a convolution, in general what has one index in the first
    dimension; of a parameter with one dimension or none, the whole. A unit whose gradient g is longer than
    ``clip_factor * max(|w|, eps)`` is scaled to that length, the others keep their bits; NaN stays NaN. Norms are
    Euclidean, taken in float32, or float64 for float64 gradients. Source: Brock et al., High-performance large-scale
    image recognition without normalization, 2021, arXiv:2102.06171, section 4, with timm's conventions; the paper does
    not clip the last linear layer.

    Args:
        parameters: a tensor or an iterable of tensors; those without a gradient are passed over.
        clip_factor: the largest ratio of the two norms, above 0.
        eps: the least norm of weights that counts, at least 0: without it weights of 0 would stay there.

    Raises:
        ValueError: clip_factor or eps out of range, or a sparse gradient, before anything is changed.
    """
    checks.number("adaptive_clip_grad_", "clip_factor", clip_factor, above=0)
    checks.number("adaptive_clip_grad_", "eps", eps)
    given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    for index, parameter in enumerate(given):
        if parameter.grad is not None and parameter.grad.layout is not torch.strided:
            raise ValueError(
                f"adaptive_clip_grad_: the gradient of parameter {index} is {parameter.grad.layout}, which has no rows"
            )
    for parameter in given:
        if (gradient := parameter.grad) is None or not gradient.numel():
            continue
        most = _unit_norms(parameter).clamp_(min=eps).mul_(clip_factor)
        norm = _unit_norms(gradient)
        factor = torch.where(norm > most, most / norm.clamp(min=1e-6), 1.0)
        gradient.mul_(factor.to(gradient.dtype) if gradient.is_complex() else factor)


def _unit_norms(tensor: Tensor) -> Tensor:
    """The norm of each unit, in a shape that can be multiplied with the tensor."""
    dims = tuple(range(1, tensor.dim())) or None
    wide = torch.float64 if tensor.dtype in (torch.float64, torch.complex128) else torch.float32
    if tensor.is_complex():
        tensor = tensor.abs()
    return torch.linalg.vector_norm(tensor, dim=dims, keepdim=dims is not None, dtype=wide)
