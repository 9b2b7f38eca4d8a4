"""Which way a loss goes: to trainopt's operators, or to torch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function

from trainopt._extension import _C
from trainopt.losses.arguments import assume_constant_result
from trainopt.losses.chunks import only_torch_honours, tokens_in_chunk
from trainopt.losses.options import CrossEntropyOptions, packed, with_ignore_index
from trainopt.switches import REFERENCE_FORCED

_NO_OVERRIDE = torch._C._disabled_torch_function_impl
_DEVICE_TYPES = _C.device_types()
_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_LABELS = (torch.int64, torch.uint8)


def is_only_a_mode(*arguments: Any) -> bool:
    """Of a call that something overrides: whether a mode does, such as torch.device("cpu"), and no argument."""
    return not any(
        type(argument) is not Tensor and getattr(type(argument), "__torch_function__", _NO_OVERRIDE) is not _NO_OVERRIDE
        for argument in arguments
    )


def overridden(ours: Callable[..., Any], torch_function: Callable[..., Any], *arguments: Any) -> Any:
    """A call that something overrides. A subclass knows torch's function, and not ours; a mode may see ours."""
    if not is_only_a_mode(*arguments):
        return torch_function(*arguments)
    return handle_torch_function(ours, arguments, *arguments)


def pointwise_loss(
    loss: str,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: int,
    parameter: float = 0.0,
) -> Tensor | None:
    """The operator's result, or None where it does not take these tensors."""
    if REFERENCE_FORCED:
        return None
    if not is_compiling():
        return _C.pointwise_loss(loss, input, target, weight, pos_weight, reduction, parameter)
    if not _are_traceable(input, target, weight, pos_weight):
        return None
    return torch.ops.trainopt.pointwise_loss(loss, input, target, weight, pos_weight, reduction, parameter)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: CrossEntropyOptions,
    inplace_backward: bool,
) -> Any:
    """The operator's loss, with z_loss the pair of it and its z-loss; None where it does not take these tensors."""
    if (
        REFERENCE_FORCED
        or not _has_labels(input, target, options.ignore_index)
        or _weighs_bytes(target, weight, options)
        or (weight is not None and not _is_constant_of(weight, input))
        or (target.dtype is torch.uint8 and input.dim() > 2)  # which torch reads as classes of a matrix alone
    ):
        return None
    if not is_compiling():
        return _C.cross_entropy(input, target, weight, inplace_backward, *packed(options))
    if not _are_traceable(input, None if target.dtype in _LABELS else target, weight):
        return None
    loss, z, _ = torch.ops.trainopt.cross_entropy(input, target, weight, inplace_backward, *packed(options))
    return (loss, z) if options.z_loss else loss


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    options: CrossEntropyOptions,
    chunking: Any,
    memory_budget: int | None,
) -> Any:
    """The operator's loss, with z_loss the pair of it and its z-loss; None where it does not take these tensors.

    Both are float32, or float64 for float64 operands.
    """
    operands = (input, linear_weight, target, linear_bias, weight)
    options = with_ignore_index(options)
    if (
        REFERENCE_FORCED
        or not _has_labels(input, target, options.ignore_index)
        or _weighs_bytes(target, weight, options)
        or input.dtype not in _FLOATING
        or not needs_no_promotion(linear_weight, input)
        or (linear_bias is not None and not needs_no_promotion(linear_bias, input))
        or (weight is not None and not _is_constant_of(weight, input))
        or only_torch_honours(chunking, input)
        or not (_are_traceable(input, linear_weight, linear_bias, weight) if is_compiling() else _C.takes(*operands))
    ):
        return None
    chunk = tokens_in_chunk(input, linear_weight, chunking, memory_budget)
    loss, z = torch.ops.trainopt.linear_cross_entropy(*operands, chunk, *packed(options))
    return (loss, z) if options.z_loss else loss


def _has_labels(input: Tensor, target: Tensor, ignore_index: int) -> bool:
    """Whether the target is one that the operators read as torch does: classes, or constant probabilities."""
    if not is_pair(input, target) or not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        return False
    if target.dtype is torch.int64 or target.dtype is torch.uint8:
        return input.dim() != 1 or target.dim() == 0  # torch lets one row have a target of shape (1,) too
    # Of no probabilities at all torch makes 0 or NaN, by the reduction.
    return target.is_floating_point() and target.numel() > 0 and ignore_index < 0 and _is_constant_of(target, input)


def _weighs_bytes(target: Tensor, weight: Tensor | None, options: CrossEntropyOptions) -> bool:
    """Whether the weights of uint8 classes are gathered, which torch does not do."""
    return target.dtype is torch.uint8 and weight is not None and options.label_smoothing != 0


def _is_constant_of(tensor: Tensor, input: Tensor) -> bool:
    return isinstance(tensor, Tensor) and not tensor.requires_grad and needs_no_promotion(tensor, input)


def is_pair(input: Tensor, target: Tensor) -> bool:
    """Whether both are tensors. What else they are given as, torch says what is wrong with it."""
    return isinstance(input, Tensor) and isinstance(target, Tensor)


def needs_no_promotion(tensor: Tensor, input: Tensor) -> bool:
    """Whether no promotion is needed between the two, beyond autocast's to float32."""
    if tensor.dtype is input.dtype:
        return True
    is_cast = torch.is_autocast_enabled(input.device.type) and tensor.is_floating_point()
    return is_cast and torch.float64 not in (tensor.dtype, input.dtype)


def alike(input: Tensor, target: Tensor) -> bool:
    """Whether both have one shape and one dtype, in a loss that broadcasts and promotes nothing."""
    return is_pair(input, target) and target.size() == input.size() and needs_no_promotion(target, input)


def fits(factor: Tensor | None, input: Tensor) -> bool:
    """Whether a factor of the loss is a constant of the input's dtype that broadcasts to its shape."""
    if factor is None:
        return True
    if not _is_constant_of(factor, input):
        return False
    shape, wanted = factor.shape, input.shape
    return shape == wanted or (
        len(shape) <= len(wanted) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(wanted), strict=False))
    )


def _are_traceable(*tensors: Tensor | None) -> bool:
    """Whether a compiled program may call the operators with these, of what _C.takes says about tensors in memory."""
    present = [tensor for tensor in tensors if tensor is not None]
    return not _in_function_transform() and all(
        tensor.device == present[0].device and tensor.device.type in _DEVICE_TYPES and tensor.dtype in _FLOATING
        for tensor in present
    )


@assume_constant_result
def _in_function_transform() -> bool:
    """Whether vmap, jvp or another transform of torch.func is being traced."""
    return _functorch.maybe_current_level() is not None
