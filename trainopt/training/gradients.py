"""The gradients of one update: cleared, measured, clipped. The seam where fused forms go.

The order in an update is: unscale, norm, clip, step; each once.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor
from torch.optim import Optimizer


def clear(optimizer: Optimizer) -> None:
    """Drops the gradients, as `optimizer.zero_grad()` does, without the profiler range that torch puts round it."""
    if type(optimizer).zero_grad is not Optimizer.zero_grad:
        optimizer.zero_grad()
        return
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = None


def parameters(optimizer: Optimizer) -> list[Tensor]:
    """The optimizer's parameters in order: read anew, for a group may be added at any time."""
    return [param for group in optimizer.param_groups for param in group["params"]]


def global_norm(params: list[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, a 0-dim float64 tensor on the first one's device; nothing is read back.

    16-bit gradients are summed in float32, and the norms of the tensors in float64.
    """
    gradients = [param.grad for param in params if param.grad is not None]
    if not gradients:
        return torch.zeros((), dtype=torch.float64)
    alike = defaultdict(list)
    for gradient in gradients:
        alike[gradient.dtype, gradient.device].append(gradient)
    norms: list[Tensor] = []
    for (dtype, _), tensors in alike.items():
        wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else None
        norms += torch._foreach_norm(tensors, 2, wide)
    device = gradients[0].device
    if len(alike) > 1:
        norms = [norm.to(device, torch.float64) for norm in norms]
    return torch.linalg.vector_norm(torch.stack(norms), dtype=torch.float64)


def are_finite(params: list[Tensor], norm: float) -> bool:
    """Whether no gradient holds NaN or infinity, given the global norm, which may overflow where they do not."""
    if -float("inf") < norm < float("inf"):
        return True
    return all(bool(param.grad.isfinite().all()) for param in params if param.grad is not None)


def clip(params: list[Tensor], limit: float, norm: Tensor) -> None:
    """Scales the gradients by min(1, limit / (norm + 1e-6)), torch's formula, without waiting for the device."""
    torch.nn.utils.clip_grads_with_norm_(params, limit, norm)
