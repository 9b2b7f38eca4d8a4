"""What the loss operators return, without computing it: for torch.compile, torch.export, fake and meta tensors.

They refuse what the operators refuse by devices, types and shapes.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor

import trainopt._extension  # noqa: F401  (registers the operators)

NONE = 0  # torch's number for reduction="none"
FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CLASSES = (torch.int64, torch.uint8)


def _check(reduction: int, input: Tensor, classes: Tensor | None = None, **others: Tensor | None) -> None:
    """Tensors of one device, and of floating types but for `classes`, a target of either kind."""
    tensors = {"input": input, **others} if classes is None else {"input": input, "target": classes, **others}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        torch._check(
            tensor.device == input.device,
            lambda name=name, tensor=tensor: (
                f"expected all tensors to be on one device, but {name} is on {tensor.device}"
                f" and input on {input.device}"
            ),
        )
        allowed = FLOATING + CLASSES if tensor is classes else FLOATING
        torch._check(tensor.dtype in allowed, lambda name=name, tensor=tensor: f"{name} must not be of {tensor.dtype}")
    torch._check_value(
        reduction in (0, 1, 2), lambda: f"reduction must be 0 (none), 1 (mean) or 2 (sum), not {reduction}"
    )


def _check_shape(name: str, tensor: Tensor | None, shape: list[int]) -> None:
    if tensor is None:
        return
    torch._check_value(tensor.dim() == len(shape), lambda: f"{name} must have shape {shape}, not {tensor.shape}")
    for size, expected in zip(tensor.shape, shape, strict=True):
        torch._check_value(size == expected, lambda: f"{name} must have shape {shape}, not {tensor.shape}")


def _check_target(target: Tensor, rows: list[int], class_dim: int, classes: int) -> None:
    shape = [*rows[:class_dim], classes, *rows[class_dim:]] if target.is_floating_point() else rows
    _check_shape("target", target, shape)


def _check_upstream(upstream: Tensor, lse: Tensor | None, shape: list[int], reduction: int) -> None:
    _check_shape("upstream", upstream, shape if reduction == NONE else [])
    _check_shape("lse", lse, [2, prod(shape)])


@torch.library.register_fake("trainopt::pointwise_loss")
def _(
    loss: str,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: int,
    parameter: float,
) -> Tensor:
    _check(reduction, input, target=target, weight=weight, pos_weight=pos_weight)
    dtype = torch.result_type(input, target)
    shape = _broadcast(input, target, weight, pos_weight)
    if reduction != NONE:
        return input.new_empty((), dtype=dtype)
    return torch.empty_like(input, dtype=dtype) if shape == input.shape else input.new_empty(shape, dtype=dtype)


@torch.library.register_fake("trainopt::pointwise_loss_backward")
def _(
    loss: str,
    upstream: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Any,
    pos_weight: Any,
    reduction: int,
    parameter: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor]:
    _check(reduction, input, target=target, weight=weight, pos_weight=pos_weight, upstream=upstream)
    shape = _broadcast(input, target, weight, pos_weight)
    _check_upstream(upstream, None, list(shape), reduction)
    of_input, of_target = (
        operand.new_empty(0)
        if not is_wanted
        else torch.empty_like(operand)
        if operand.shape == shape
        else operand.new_empty(operand.shape)
        for operand, is_wanted in zip((input, target), wanted, strict=True)
    )
    return of_input, of_target


def _broadcast(*tensors: Tensor | None) -> torch.Size:
    return torch.broadcast_shapes(*(tensor.shape for tensor in tensors if tensor is not None))


def _reduced(logits_like: Tensor, shape: list[int], reduction: int, z_loss: float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, z-loss and the two parts of the lse of logits whose shape without classes is `shape`."""
    reduced = shape if reduction == NONE else []
    return (
        logits_like.new_empty(reduced),
        logits_like.new_empty(reduced if z_loss != 0 else [0]),
        logits_like.new_empty([2, prod(shape)], dtype=torch.float64),
    )


def _rows_of(input: Tensor, target: Tensor, weight: Tensor | None) -> list[int]:
    """The shape of the logits without classes, which target and weight must fit."""
    torch._check_value(input.dim() > 0, lambda: "input must have a dimension of classes")
    class_dim = 0 if input.dim() == 1 else 1
    rows, classes = [*input.shape[:class_dim], *input.shape[class_dim + 1 :]], input.shape[class_dim]
    _check_target(target, rows, class_dim, classes)
    _check_shape("weight", weight, [classes])
    return rows


@torch.library.register_fake("trainopt::cross_entropy")
def _(
    input: Tensor,
    target: Tensor,
    weight: Any,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    inplace_backward: bool,
    empty_is_zero: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(reduction, input, target, weight=weight)
    return _reduced(input, _rows_of(input, target, weight), reduction, z_loss)


@torch.library.register_fake("trainopt::cross_entropy_backward")
def _(
    upstream: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Any,
    lse: Tensor,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    empty_is_zero: bool,
) -> Tensor:
    _check(reduction, input, target, weight=weight, upstream=upstream, lse=lse)
    _check_upstream(upstream, lse, _rows_of(input, target, weight), reduction)
    return torch.empty_like(input)


def _logits_like(input: Tensor) -> Tensor:
    """A tensor of the dtype of linear cross-entropy's logits, which its loss has too."""
    return input.new_empty(0, dtype=torch.float64 if input.dtype == torch.float64 else torch.float32)


def _tokens_of(
    input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, class_weight: Tensor | None, reduction: int
) -> list[int]:
    """The shape of the hidden states without features, once all operands fit together."""
    _check(reduction, input, target, weight=weight, bias=bias, class_weight=class_weight)
    torch._check_value(input.dim() > 0 and weight.dim() == 2, lambda: "weight must have shape (classes, width)")
    (*rows, features), classes = input.shape, weight.shape[0]
    _check_shape("weight", weight, [classes, features])
    _check_shape("bias", bias, [classes])
    _check_shape("class_weight", class_weight, [classes])
    _check_target(target, rows, len(rows), classes)
    return rows


@torch.library.register_fake("trainopt::linear_cross_entropy")
def _(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Any,
    class_weight: Any,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    empty_is_zero: bool,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    rows = _tokens_of(input, weight, target, bias, class_weight, reduction)
    return _reduced(_logits_like(input), rows, reduction, z_loss)[:2]


def _gradients(operands: tuple[Tensor, Tensor, Tensor | None], wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    first, second, third = (
        operand.new_empty(operand.shape) if is_wanted and operand is not None else operands[0].new_empty(0)
        for operand, is_wanted in zip(operands, wanted, strict=True)
    )
    return first, second, third


@torch.library.register_fake("trainopt::linear_cross_entropy_forward")
def _(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Any,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    empty_is_zero: bool,
    chunk: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = _tokens_of(input, weight, target, bias, class_weight, reduction)
    return *_reduced(_logits_like(input), rows, reduction, z_loss), *_gradients((input, weight, bias), wanted)


@torch.library.register_fake("trainopt::linear_cross_entropy_backward")
def _(
    upstream: Tensor,
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Any,
    lse: Tensor,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    empty_is_zero: bool,
    chunk: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    rows = _tokens_of(input, weight, target, bias, class_weight, reduction)
    _check(reduction, input, upstream=upstream, lse=lse)
    _check_upstream(upstream, lse, rows, reduction)
    return _gradients((input, weight, bias), wanted)
