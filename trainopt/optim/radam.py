"""RAdam."""

from typing import Any, Unpack

import torch

from trainopt import originals
from trainopt.optim.base import Fused
from trainopt.optim.options import UnfusedExtras


class RAdam(Fused, originals.RAdam, rule="radam"):
    """torch.optim.RAdam with a fused step: Adam that waits for its second moment.

    Every argument, default, error and state key is that of `torch.optim.RAdam`. With gradient g, at a parameter's step
    t::

        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        c1, c2 = 1 - beta1**t, 1 - beta2**t
        r_max = 2 / (1 - beta2) - 1
        r = r_max - 2 * t * beta2**t / c2
        f = sqrt((r - 4) * (r - 2) * r_max / ((r_max - 4) * (r_max - 2) * r))
        p = p - lr * f * (m / c1) * sqrt(c2) / (sqrt(v) + eps)    # while r <= 5: p - lr * m / c1

    Keyword-only, beyond torch, and in each parameter group like any other option:

    Args:
        fused: with True (default None), GradScaler leaves its scale, and what it has found, to the step.
        l1, l1_proximal, noise, seed, skip_nonfinite, max_grad_norm, error_if_nonfinite, zero_grad, ema_decay,
            ema_warmup, state_dtype, precision, cautious, cautious_weight_decay, stats: as in `trainopt.SGD`.

    The states m and v (``exp_avg``, ``exp_avg_sq``) have the parameter's dtype; arithmetic is float32, or float64
    for float64 parameters. Source of the formula: Liu et al., On the variance of the adaptive learning rate and
    beyond, 2020, arXiv:1908.03265.
    """

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **extras: Unpack[UnfusedExtras],
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            **extras,
        )
