"""The gradients of one update: cleared, looked at, measured, clipped; in one call of the compiled module where it can.

The order in an update is: unscale, norm, clip, step; each once.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict

import torch
from torch import Tensor
from torch.optim import Optimizer

from trainopt import originals
from trainopt._extension import _C
from trainopt.training.distributed import is_dtensor, whole

LARGE = 4096  # elements from which on a dot product is quicker than a look at each
DOTTED = (torch.float32, torch.float64)


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


def scale(params: list[Tensor], factor: float | Tensor) -> None:
    """Multiplies the gradients by a factor, in place and without waiting for a device."""
    if not isinstance(factor, Tensor) and factor == 1.0:
        return
    for gradients in in_lists(params):
        if isinstance(factor, Tensor) or type(gradients[0]) is not Tensor:
            for gradient in gradients:
                gradient.mul_(factor)
        else:
            torch._foreach_mul_(gradients, factor)


def global_norm(params: list[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, a 0-dim float64 tensor on the first one's device; nothing is read back.

    Every gradient is read once, and summed in float64 where the compiled module takes them; elsewhere 16-bit gradients
    are summed in float32, and the norms of the tensors in float64.
    """
    if (fused := _fused_norm(params, 2.0)) is not None:
        return fused if isinstance(fused, Tensor) else torch.tensor(fused, dtype=torch.float64)
    norms: list[Tensor] = []
    for gradients in in_lists(params):
        found = torch._foreach_norm(gradients, 2, torch.float32 if gradients[0].itemsize == 2 else None)
        norms += [whole(torch.linalg.vector_norm(torch.stack(found)))] if is_dtensor(gradients[0]) else found
    if not norms:
        return torch.zeros((), dtype=torch.float64)
    device, dtype = norms[0].device, norms[0].dtype
    if any(norm.device != device or norm.dtype != dtype for norm in norms):
        norms = [norm.to(device, torch.float64) for norm in norms]
    return torch.linalg.vector_norm(torch.stack(norms), dtype=torch.float64)


def are_finite(params: list[Tensor], norm: Tensor | None) -> bool:
    """Whether no gradient, of a DTensor this process's part, holds NaN or infinity. Waits for the device.

    Args:
        norm: the global norm where it has been computed; it says so at once, unless it overflowed.
    """
    value = _fused_norm(params, math.inf) if norm is None else norm  # the quickest of the norms: it cannot overflow
    if value is not None and math.isfinite(value):
        return True
    for gradients in in_lists(params):
        if is_dtensor(gradients[0]):  # the other processes look at their own parts
            gradients = [gradient.to_local() for gradient in gradients]  # type: ignore[attr-defined]
        if type(gradients[0]) is not Tensor or gradients[0].is_complex():  # which torch's check for GradScaler refuses
            if not all(bool(gradient.isfinite().all()) for gradient in gradients):
                return False
            continue
        rest = [gradient for gradient in gradients if not has_finite_square(gradient)]
        if rest:  # torch's own check for GradScaler, which multiplies by 1 on its way
            found = torch.zeros((), device=rest[0].device)
            torch._amp_foreach_non_finite_check_and_unscale_(rest, found, one_on(rest[0].device))
            if found.item():
                return False
    return True


def has_finite_square(gradient: Tensor) -> bool:
    """Whether the sum of a large gradient's squares is finite: on the CPU, one read of it. False for a small one."""
    if gradient.numel() < LARGE or not gradient.is_cpu or gradient.dtype not in DOTTED or not gradient.is_contiguous():
        return False
    flat = gradient.view(-1)
    return math.isfinite(torch.dot(flat, flat).item())


def clip(params: list[Tensor], limit: float, norm: Tensor) -> None:
    """Scales the gradients by min(1, limit / (norm + 1e-6)), torch's formula, without waiting for a device."""
    if not _C.clip_gradients(params, limit, norm.item() if norm.is_cpu else norm):
        by_type = defaultdict(list)
        for param in params:
            by_type[type(param.grad)].append(param)
        for of_one_type in by_type.values():  # torch takes no list of both tensors and DTensors
            originals.clip._clip_grads_with_norm_(of_one_type, limit, norm)


def _fused_norm(params: list[Tensor], order: float) -> float | Tensor | None:
    """A norm of all gradients, NaN where one is: on CUDA a float64 tensor; None where the compiled module does not take
    them."""
    found = _C.norm_of(params, order, True)
    return None if found is None else found[0]


@functools.cache
def one_on(device: torch.device) -> Tensor:
    """The number 1 on a device."""
    return torch.ones((), device=device)


def in_lists(params: list[Tensor]) -> list[list[Tensor]]:
    """The gradients (of a sparse one its values) in lists of one type, dtype, device and mesh each, for torch's foreach
    functions take no mixture of types and meshes."""
    gradients = [param.grad for param in params if param.grad is not None]
    if not gradients:
        return []
    kind, dtype, device = type(gradients[0]), gradients[0].dtype, gradients[0].get_device()
    for gradient in gradients:
        is_same = type(gradient) is kind and gradient.dtype is dtype and gradient.get_device() == device
        if not is_same or gradient.is_sparse or is_dtensor(gradients[0]):
            break
    else:
        return [gradients]
    lists = defaultdict(list)
    for gradient in gradients:
        values = gradient.coalesce().values() if gradient.is_sparse else gradient
        mesh = values.device_mesh if is_dtensor(values) else None  # type: ignore[attr-defined]
        lists[type(values), values.dtype, values.device, mesh].append(values)
    return list(lists.values())
