"""Where the first NaN or infinity of an update comes from.

The update's micro-batches are gone through once more, on the weights as they are, with every layer's output and its
gradient looked at in the order in which they are computed. That costs an update, and only when one has been lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trainopt.optim.nonfinite import count_nonfinite
from trainopt.training import random_state
from trainopt.training.data import move, tensors_in
from trainopt.training.precision import Precision
from trainopt.training.trained import Trained


def first_nonfinite(
    model: nn.Module,
    micro_batches: Sequence[tuple[Any, float | Tensor]],
    task: Trained,
    precision: Precision,
    device: torch.device,
) -> str | None:
    """A phrase that names the first offending tensor and its layer; None if all is finite when computed again.

    Looked at in this order: parameters, inputs, outputs of layers, loss, gradients of the layers' outputs (from the
    loss backwards), gradients of parameters. The gradients are cleared.

    Args:
        model: the bare module. Its buffers are not restored.
        micro_batches: each with the weight of its mean loss in the update. float16's scale is right for the weighed
            loss, and may overflow for a healthy one that is not.
    """
    for name, param in model.named_parameters():
        if (found := described(param)) is not None:
            return f"parameter '{name}' itself {found}"
    with random_state.preserved(device=device):
        for batch, weight in micro_batches:
            if (found := _in_one(model, move(batch, device), weight, task, precision)) is not None:
                return found
    return None


def nonfinite_gradient(model: nn.Module) -> str:
    """A phrase that names the last parameter whose gradient is not finite: the first that backward came to."""
    for name, param in reversed(list(model.named_parameters())):
        if (found := described(param.grad)) is not None:
            return f"the gradient of parameter '{name}' {found}"
    return "a gradient is not finite"


def _in_one(model: nn.Module, batch: Any, weight: float | Tensor, task: Trained, precision: Precision) -> str | None:
    inputs, target = task.split(batch)
    for what, tree in (("inputs", inputs), ("target", target)):
        for tensor in tensors_in(tree):
            if (found := described(tensor)) is not None:
                return f"the batch's {what}, a tensor of shape {tuple(tensor.shape)}, {found}"
    model.zero_grad()
    found_in: list[str] = []
    with _watched(model, found_in):
        with precision.autocast():
            output = task.output(model, inputs)
            loss = task.loss(output, target)
        if not found_in and (found := described(loss)) is not None:
            found_in.append(f"the loss {found}, while the model's output is finite")
        if not found_in and loss.requires_grad:
            precision.scaled(loss * weight).backward()
    if not found_in:
        found_in += [nonfinite_gradient(model)] if any(described(param.grad) for param in model.parameters()) else []
    model.zero_grad()
    return found_in[0] if found_in else None


@contextmanager
def _watched(model: nn.Module, found_in: list[str]) -> Iterator[None]:
    """Notes the first output, and then the first gradient of an output, that is not finite."""

    def watch(name: str, module: nn.Module) -> Any:
        layer = f"layer '{name}' ({type(module).__name__})" if name else f"the model ({type(module).__name__})"

        def look_back(gradient: Tensor) -> None:
            if not found_in and (found := described(gradient)) is not None:
                found_in.append(f"the gradient of the output of {layer} {found}")

        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            for tensor in tensors_in(output):
                if not found_in and (found := described(tensor)) is not None:
                    found_in.append(f"the output of {layer} {found}")
                if tensor.requires_grad:
                    tensor.register_hook(look_back)

        return module.register_forward_hook(look)

    handles = [watch(name, module) for name, module in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def described(tensor: Any) -> str | None:
    """What is not finite in a tensor, with numbers; None if all is."""
    nan, inf, numel = count_nonfinite(tensor)
    return f"has {nan:,} NaN and {inf:,} Inf of {numel:,} elements" if nan or inf else None
