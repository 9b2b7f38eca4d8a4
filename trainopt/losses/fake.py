"""What the loss operators return, without computing it: for torch.compile, torch.export and fake tensors."""

from math import prod
from typing import Any

import torch
from torch import Tensor

import trainopt._extension  # noqa: F401  (registers the operators)

NONE = 0  # torch's number for reduction="none"


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
    dtype = torch.result_type(input, target)
    if reduction != NONE:
        return input.new_empty((), dtype=dtype)
    others = [tensor for tensor in (target, weight, pos_weight) if tensor is not None]
    shape = torch.broadcast_shapes(input.shape, *(tensor.shape for tensor in others))
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
    shape = torch.broadcast_shapes(input.shape, target.shape)
    of_input, of_target = (
        operand.new_empty(0)
        if not is_wanted
        else torch.empty_like(operand)
        if operand.shape == shape
        else operand.new_empty(operand.shape)
        for operand, is_wanted in zip((input, target), wanted, strict=True)
    )
    return of_input, of_target


def _reduced(logits_like: Tensor, shape: list[int], reduction: int, z_loss: float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, z-loss and the two parts of the lse of logits whose shape without classes is `shape`."""
    reduced = shape if reduction == NONE else []
    return (
        logits_like.new_empty(reduced),
        logits_like.new_empty(reduced if z_loss != 0 else [0]),
        logits_like.new_empty([2, prod(shape)], dtype=torch.float64),
    )


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
    class_dim = 0 if input.dim() == 1 else 1
    return _reduced(input, [*input.shape[:class_dim], *input.shape[class_dim + 1 :]], reduction, z_loss)


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
    return torch.empty_like(input)


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
    chunk_bytes: int,
) -> tuple[Tensor, Tensor]:
    return _reduced(input, list(input.shape[:-1]), reduction, z_loss)[:2]


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
    chunk_bytes: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return *_reduced(input, list(input.shape[:-1]), reduction, z_loss), *_gradients((input, weight, bias), wanted)


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
    chunk_bytes: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients((input, weight, bias), wanted)
