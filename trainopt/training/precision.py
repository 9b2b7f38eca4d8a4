"""The type that the forward pass computes in, and the scale that keeps float16 gradients from vanishing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_AS_IT_IS: AbstractContextManager[None] = nullcontext()


class Precision:
    """float32: everything as the model has it. bfloat16 and float16: autocast; float16 with a GradScaler too.

    Args:
        name: "float32", "bfloat16" or "float16".
        device: of the model.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.device = device
        self.dtype = None if name == "float32" else getattr(torch, name)
        self.scaler = torch.amp.GradScaler(device.type) if name == "float16" else None

    def autocast(self) -> AbstractContextManager[Any]:
        """What the forward pass and the loss are computed inside of."""
        return _AS_IT_IS if self.dtype is None else torch.autocast(self.device.type, self.dtype)

    def run(self, forward: Callable[..., T], *operands: Any) -> T:
        """What `forward` gives, computed in this type."""
        if self.dtype is None:
            return forward(*operands)
        with self.autocast():
            return forward(*operands)

    def scaled(self, loss: Tensor) -> Tensor:
        """What backward starts from."""
        return loss if self.scaler is None else self.scaler.scale(loss)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divides the gradients by the scale; once an update, before anything looks at them."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)

    def adapt(self) -> None:
        """After each update, skipped or not: the scale is halved where the gradient overflowed, and grows again."""
        if self.scaler is not None:
            self.scaler.update()

    def is_searching(self) -> bool:
        """Whether an overflow may be the scale's own doing: it is still above 1."""
        return self.scaler is not None and self.scaler.get_scale() > 1.0
