"""Rprop."""

from typing import Any, Unpack

import torch

from trainopt import originals
from trainopt.optim.base import Fused
from trainopt.optim.options import UnfusedExtras


class Rprop(Fused, originals.Rprop, rule="rprop"):
    """torch.optim.Rprop with a fused step: each element moves by a step of its own, for full-batch training.

    Every argument, default, error and state key is that of `torch.optim.Rprop`. With gradient g, at a parameter's step
    t::

        s = s * etas[1]    # where g has the sign of the state prev
        s = s * etas[0]    # where it has the other; there g = 0 from here on
        s = min(max(s, step_sizes[0]), step_sizes[1])
        p = p - sign(g) * s
        prev = g

    Keyword-only, beyond torch, and in each parameter group like any other option:

    Args:
        fused: with True (default None), GradScaler leaves its scale, and what it has found, to the step.
        l1, l1_proximal, noise, seed, skip_nonfinite, max_grad_norm, error_if_nonfinite, zero_grad, ema_decay,
            ema_warmup, state_dtype, precision, cautious, cautious_weight_decay, stats: as in `trainopt.SGD`.

    The states s, which is lr in the first step, and prev (``step_size``, ``prev``) have the parameter's dtype;
    arithmetic is float32, or float64 for float64 parameters. There is no weight decay. Source of the formula:
    Riedmiller & Braun, A direct adaptive method for faster backpropagation learning, 1993.
    """

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-2,
        etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-6, 50),
        *,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **extras: Unpack[UnfusedExtras],
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            etas=etas,
            step_sizes=step_sizes,
            capturable=capturable,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
            **extras,
        )

    def _begin_first_step(self, state: dict[str, Any], group: dict[str, Any]) -> None:
        size, lr = state.get("step_size"), group["lr"]
        if isinstance(size, torch.Tensor):
            parts = torch.view_as_real(size) if size.is_complex() else size
            with torch.no_grad():
                parts.copy_(torch.where(parts == 0, lr.squeeze() if isinstance(lr, torch.Tensor) else lr, parts))
