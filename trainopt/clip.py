"""Gradient clipping: drop-ins for torch.nn.utils.clip_grad_norm_, get_total_norm, clip_grads_with_norm_ and
clip_grad_value_.

Where torch reads each gradient and then multiplies each, these read all in one call, and multiply only if the norm is
over the limit. Sums are in float64, in an order that does not depend on the number of threads. On CUDA the norm and
the factor stay on the device, and nothing waits for it.

The norm of float16 and bfloat16 gradients is returned in float32. Torch documents no dtype, and returns the gradients'
own: there float16 gradients whose norm is above 65,504 have the norm infinity, and are set to 0, and a bfloat16 norm in
a log moves in steps of 1/256 of itself.
"""

import math
from collections.abc import Iterable
from types import GeneratorType

import torch
from torch import Tensor

from trainopt import switches
from trainopt._extension import _C
from trainopt.originals import clip as stock

_ORDERS = (1.0, 2.0, math.inf)  # any other goes through torch
_SHORT = (torch.float16, torch.bfloat16)


def _listed(tensors: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _is_torchs_to_do() -> bool:
    return switches.REFERENCE_FORCED or torch.compiler.is_compiling()


def _norm(tensors: list[Tensor], order: float, of_gradients: bool) -> tuple[float | Tensor, Tensor] | None:
    """The norm in float64, on CUDA a tensor; and as the tensor that torch gives. None if torch must do it."""
    if order not in _ORDERS or _is_torchs_to_do():
        return None
    return _C.norm_of(tensors, order, of_gradients)


def check_finite(total: Tensor, order: float) -> None:
    """Torch's own error for a norm that is infinite or NaN."""
    if not math.isfinite(total.item()):
        stock._get_total_norm([total], order, error_if_nonfinite=True)


@torch.no_grad()
def _norm_by_torch(
    tensors: list[Tensor], order: float, error_if_nonfinite: bool = False, foreach: bool | None = None
) -> Tensor:
    """Torch's norm of the tensors' norms, those of 16-bit tensors in float32."""
    norms = [
        torch.linalg.vector_norm(t, order, dtype=torch.float32)
        if t.dtype in _SHORT and t.layout == torch.strided
        else t
        for t in tensors
    ]
    return stock._get_total_norm(norms, order, error_if_nonfinite, foreach)


def get_total_norm(
    tensors: Tensor | Iterable[Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """The norm of all elements of some tensors, as torch.nn.utils.get_total_norm.

    Args:
        tensors: a tensor or an iterable of tensors, of any shapes and dtypes.
        norm_type: the order p: 1, 2 or infinity in one call of the compiled module, any other through torch.
            Unlike torch, an empty tensor has a norm of 0 for each of the three.
        error_if_nonfinite: raise RuntimeError if the norm is infinite or NaN; on CUDA this waits for the device.
        foreach: for tensors that torch takes care of: sparse ones, those of several devices, subclasses.

    Returns:
        A 0-dimensional tensor on the tensors' device, rounded once from float64 to their dtype (if they differ, to the
        one that torch promotes them to), but to float32 for float16 and bfloat16; 0 in the default dtype if there are
        no tensors.
    """
    tensors = _listed(tensors)
    order = float(norm_type)
    found = _norm(tensors, order, of_gradients=False)
    if found is None:
        return _norm_by_torch(tensors, order, error_if_nonfinite, foreach)
    _, total = found
    if error_if_nonfinite:
        check_finite(total, order)
    return total


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scales gradients so that their norm is at most `max_norm`, as torch.nn.utils.clip_grad_norm_.

    All gradients are multiplied in place by min(1, max_norm / (norm + 1e-6)), the norm taken over the elements of all,
    in float64. Where that factor is 1, they are not written to. A norm that is NaN makes them NaN. On CUDA the device
    alone knows the factor: version counters move even where it is 1.

    Args:
        parameters: a tensor or an iterable of tensors; those without a gradient are passed over.
        max_norm: the largest norm to be left.
        norm_type: the order p: 1, 2 or infinity in one call of the compiled module, any other through torch.
            Unlike torch, an empty tensor has a norm of 0 for each of the three.
        error_if_nonfinite: raise RuntimeError, before anything is changed, if the norm is infinite or NaN; on CUDA this
            waits for the device.
        foreach: for gradients that torch takes care of: sparse ones, those of several devices, subclasses.

    Returns:
        The norm before clipping: a 0-dimensional tensor on the gradients' device, of their dtype (if they differ, of
        the one that torch promotes them to), but float32 for float16 and bfloat16; 0 in the default dtype if there are
        no gradients. Where it is beyond its dtype it is infinity; the gradients are scaled by what it is in float64.
    """
    given = _listed(parameters)
    if not given and isinstance(parameters, GeneratorType):
        # Torch warns of an empty generator, which is nearly always one that has been used up.
        return stock.clip_grad_norm_((p for p in given), max_norm, norm_type, error_if_nonfinite, foreach)
    order = float(norm_type)
    found = _norm(given, order, of_gradients=True)
    if found is None:
        gradients = [p.grad for p in given if p.grad is not None]
        if not any(g.dtype in _SHORT for g in gradients):
            return stock.clip_grad_norm_(given, max_norm, norm_type, error_if_nonfinite, foreach)
        total = _norm_by_torch(gradients, order, error_if_nonfinite, foreach)
        stock._clip_grads_with_norm_(given, float(max_norm), total, foreach)
        return total
    norm, total = found
    if error_if_nonfinite:
        check_finite(total, order)
    if not _C.clip_gradients(given, float(max_norm), norm):
        # Gradients that share memory are scaled one after the other: torch's foreach kernels on CUDA race for it.
        stock._clip_grads_with_norm_(given, max_norm, total, foreach=False)
    return total


def clip_grads_with_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    total_norm: Tensor,
    foreach: bool | None = None,
) -> None:
    """Scales gradients by a norm that is known already, as torch.nn.utils.clip_grads_with_norm_.

    All gradients are multiplied in place by min(1, max_norm / (total_norm + 1e-6)). Where the host knows that this is
    1, they are not written to.

    Args:
        parameters: a tensor or an iterable of tensors; those without a gradient are passed over.
        max_norm: the norm that gradients of norm `total_norm` are scaled to, if it is smaller.
        total_norm: the gradients' norm, a tensor of one element, of any device and floating dtype.
        foreach: for gradients that torch takes care of: sparse ones, those of several devices, subclasses.
    """
    given = _listed(parameters)
    if (
        _is_torchs_to_do()
        or type(total_norm) is not Tensor
        or total_norm.dim() > 0
        or not total_norm.is_floating_point()
        or not _C.clip_gradients(given, float(max_norm), _on_host_or_device(total_norm))
    ):
        stock._clip_grads_with_norm_(given, max_norm, total_norm, foreach)


def _on_host_or_device(norm: Tensor) -> float | Tensor:
    return float(norm) if norm.is_cpu else norm.detach().double()


#: float16's largest number. Beyond it torch has words of its own for the dtypes that cannot hold a limit.
_MOST = 65504.0


def clip_grad_value_(parameters: Tensor | Iterable[Tensor], clip_value: float, foreach: bool | None = None) -> None:
    """Brings every element of the gradients into [-clip_value, clip_value], as torch.nn.utils.clip_grad_value_.

    In place, in one call for all gradients. NaN stays NaN. Where no element lies beyond, nothing is written; version
    counters move all the same, as torch's do.

    Args:
        parameters: a tensor or an iterable of tensors; those without a gradient are passed over.
        clip_value: the largest size of an element to be left, at least 0.
        foreach: for gradients that torch takes care of: sparse ones, those of several devices, subclasses.
    """
    given = _listed(parameters)
    limit = float(clip_value)
    if _is_torchs_to_do() or not 0 <= limit <= _MOST or not _C.clamp_gradients(given, limit):
        stock.clip_grad_value_(given, clip_value, foreach)
