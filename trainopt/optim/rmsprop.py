"""RMSprop."""

from typing import Any, Unpack

import torch

from trainopt import originals
from trainopt.optim.base import Fused
from trainopt.optim.options import UnfusedExtras


class RMSprop(Fused, originals.RMSprop, rule="rmsprop"):
    """torch.optim.RMSprop with a fused step: the gradient, divided by the root of its average square.

    Every argument, default, error and state key is that of `torch.optim.RMSprop`. With gradient g, at a parameter's
    step t::

        v = alpha * v + (1 - alpha) * g**2
        a = alpha * a + (1 - alpha) * g                  # with centered=True
        u = g / (sqrt(v - a**2) + eps)                   # without: g / (sqrt(v) + eps)
        b = momentum * b + u                             # with momentum
        p = p - lr * b                                   # without: p - lr * u

    Keyword-only, beyond torch, and in each parameter group like any other option:

    Args:
        fused: with True (default None), GradScaler leaves its scale, and what it has found, to the step.
        l1, l1_proximal, noise, seed, skip_nonfinite, max_grad_norm, error_if_nonfinite, zero_grad, ema_decay,
            ema_warmup, state_dtype, precision, cautious, cautious_weight_decay, stats: as in `trainopt.SGD`.

    The states v, a and b (``square_avg``, ``grad_avg``, ``momentum_buffer``) have the parameter's dtype; arithmetic
    is float32, or float64 for float64 parameters. Source of the formula: Tieleman & Hinton, 2012; centered: Graves,
    2013, arXiv:1308.0850.
    """

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 0.01,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **extras: Unpack[UnfusedExtras],
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            alpha=alpha,
            eps=eps,
            weight_decay=weight_decay,
            momentum=momentum,
            centered=centered,
            capturable=capturable,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
            **extras,
        )
