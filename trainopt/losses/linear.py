"""The output layer and cross-entropy in one: torch.nn.functional.linear_cross_entropy, without storing the logits."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_variadic

from trainopt.losses import chunks, dispatch, reference
from trainopt.losses.dispatch import is_only_a_mode
from trainopt.losses.options import CrossEntropyOptions, check, has_only_torch_options
from trainopt.originals import functional as F


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    return_z_loss: bool = False,
    softcap: float | None = None,
    empty: str = "nan",
    memory_budget: int | None = None,
    out_dtype: torch.dtype | None = None,
    temperature: float = 1.0,
) -> Any:  # a pair with return_z_loss: a union would ask every caller which
    """cross_entropy(linear(input, linear_weight, linear_bias), target) without the logits of more than a few tokens.

    Names, order, defaults and errors are those of torch.nn.functional.linear_cross_entropy, also where torch is older
    than it (2.13). The logits are made, used and forgotten chunk by chunk, in float32 (float64 for float64 operands; on
    a GPU bfloat16 for bfloat16 ones, as a linear layer's); the sums over chunks that make the gradients of layer and
    bias are float32 or float64, whatever the dtype. With a reduction to one number forward makes the gradients as well,
    if any is wanted; otherwise backward makes the logits again, as does a second backward. A backward that is to be
    differentiated again (create_graph=True) stores all logits, as does what goes through torch: K-dimensional weights,
    and whatever the operator does not take.

    Args:
        input: hidden states, (N, features) or (features).
        linear_weight: of the output layer, (classes, features); through torch also (classes, d1, …, features), whose
            loss is K-dimensional.
        target: classes (int64 or uint8), (N) or (); or probabilities, (N, classes) or (classes). With d1, … at the end.
        linear_bias: of the output layer, (classes), or (classes, d1, …).
        weight: a factor for each class, (classes): cross_entropy's weight.
        reduction, label_smoothing, z_loss, return_z_loss, softcap, empty, temperature: as for cross_entropy.
        ignore_index: rows of this class count for nothing; None is -100. With probabilities it must be None.
        options: torch.nn.LinearCrossEntropyOptions (trainopt.LinearCrossEntropyOptions is the same, or a stand-in where
            torch has none). There are chunks without it too. A size that it names is a chunk's; what only torch's own
            chunks can honour (see docs/losses.md) goes through torch.
        memory_budget: bytes for a chunk of logits; at least one token is taken at a time. By default 32 MiB on the CPU,
            and on a GPU what makes the products fast, in less memory than stored logits take (see docs/cuda.md).
        out_dtype: dtype of the loss. By default the input's, as in torch, or autocast's float32. torch.float32 for
            bfloat16 operands gives a loss that moves in finer steps than 1/64, and one that GradScaler's factor does
            not make infinite for float16.

    Raises:
        IndexError: a class out of range, with its value and position; on a GPU at the next call, see check_targets.
        RuntimeError: shapes that do not match; a linear_weight that is a shard, with what to gather.
        TypeError: something that is no Tensor where one is due.
        ValueError: an option out of its range, or two that contradict each other.
    """
    operands = (input, linear_weight, target, linear_bias, weight)
    is_overridden = has_torch_function_variadic(*operands)
    if is_overridden and is_only_a_mode(*operands):
        return handle_torch_function(
            linear_cross_entropy,
            operands,
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            options=options,
            z_loss=z_loss,
            return_z_loss=return_z_loss,
            softcap=softcap,
            empty=empty,
            memory_budget=memory_budget,
            out_dtype=out_dtype,
            temperature=temperature,
        )
    settings = CrossEntropyOptions(reduction, ignore_index, label_smoothing, z_loss, softcap, empty, temperature)
    check(settings)
    check_chunks(memory_budget, out_dtype)
    result = None
    if not is_overridden:
        check_tensors(*operands)
        if _fit(*operands, ignore_index) and 0 <= label_smoothing <= 1:
            result = dispatch.linear_cross_entropy(*operands, settings, options, memory_budget)
        if result is None:
            check_gathered(input, linear_weight)
    if result is not None:
        result = _rounded(result, input, out_dtype)
    elif has_only_torch_options(settings) and out_dtype is None and _torch_function is not None:
        result = _torch_function(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            options=options,
        )
    else:
        if option := chunks.only_torch_honours(options, input):
            raise ValueError(
                f"linear_cross_entropy: options with {option} need torch's own chunks, of torch 2.13 or newer, which"
                " know no z_loss, softcap, empty, temperature or out_dtype"
            )
        if options is not None:
            warnings.warn(
                "linear_cross_entropy: ``options`` ignored; all logits are stored for operands that trainopt's operator"
                " does not take",
                stacklevel=2,
            )
        result = reference.linear_cross_entropy(*operands, settings, out_dtype)
    if not return_z_loss:
        return result[0] if z_loss else result
    return result if z_loss else (result, torch.zeros_like(result))


_torch_function = getattr(F, "linear_cross_entropy", None)


def check_chunks(memory_budget: int | None, out_dtype: torch.dtype | None) -> None:
    """ValueError for an option of trainopt's own, beside those of cross_entropy, that is out of its range."""
    if memory_budget is not None and not (isinstance(memory_budget, int) and memory_budget > 0):
        raise ValueError(f"memory_budget must be a whole number of bytes greater than 0, not {memory_budget!r}")
    if out_dtype is not None and not (isinstance(out_dtype, torch.dtype) and out_dtype.is_floating_point):
        raise ValueError(f"out_dtype must be a floating dtype, such as torch.float32, or None, not {out_dtype!r}")


def check_tensors(*operands: Any) -> None:
    """TypeError for an operand that is no Tensor; linear_bias and weight may be None."""
    for i, operand in enumerate(operands):
        if isinstance(operand, Tensor) or (operand is None and i > 2):
            continue
        name = ("input", "linear_weight", "target", "linear_bias", "weight")[i]
        message = f"linear_cross_entropy(): argument '{name}' (position {i + 1}) must be Tensor, not "
        message += type(operand).__name__
        if isinstance(operand, nn.Module):
            message += ": of a layer give the tensors, linear_weight=layer.weight and linear_bias=layer.bias"
        raise TypeError(message)


class ShardedWeightError(RuntimeError, ValueError):
    """A weight that is not whole here. torch, which would fail at a later place, raises RuntimeError."""


def check_gathered(input: Tensor, linear_weight: Tensor) -> None:
    """ShardedWeightError for a weight of which a wrapper that shards the model has left a part, or nothing, here."""
    shape = tuple(linear_weight.shape)
    if hasattr(linear_weight, "full_tensor") and not hasattr(input, "full_tensor"):
        found = (
            f"linear_weight is a DTensor, of which this process may hold a shard, and input is a {type(input).__name__}"
        )
    elif linear_weight.dim() < 2:
        found = f"expected linear_weight with dimensionality at least 2, got {linear_weight.dim()} (shape {shape})"
    elif linear_weight.numel() == 0 and (linear_weight.shape[-1] != input.shape[-1:].numel() or input.numel() != 0):
        found = f"linear_weight is empty, it has shape {shape}"
    else:
        return
    raise ShardedWeightError(
        f"{found}. Where the model is sharded (FSDP, ZeRO), gather the weight first: linear_weight.full_tensor(),"
        " FSDP.summon_full_params or deepspeed.zero.GatheredParameters; or let trainopt.LinearCrossEntropyLoss own it,"
        " and call that"
    )


def _fit(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    ignore_index: int | None,
) -> bool:
    """Whether these are a plain matrix product and its targets; anything else torch takes or refuses."""
    sizes, layer = input.shape, linear_weight.shape
    if len(layer) != 2 or len(sizes) not in (1, 2) or sizes[-1] != layer[1] or 0 in layer:
        return False
    classes = layer[:1]
    if (linear_bias is not None and linear_bias.shape != classes) or (weight is not None and weight.shape != classes):
        return False
    if target.is_floating_point():
        return ignore_index is None and target.shape == sizes[:-1] + classes
    return target.shape == sizes[:-1]


def _rounded(result: Any, input: Tensor, out_dtype: torch.dtype | None) -> Any:
    """The operator's float32 in the dtype that was asked for; else as torch: autocast's float32, or the input's."""
    if out_dtype is None:
        if input.dtype not in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(input.device.type):
            return result
        out_dtype = input.dtype
    return tuple(each.to(out_dtype) for each in result) if isinstance(result, tuple) else result.to(out_dtype)
