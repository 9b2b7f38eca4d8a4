"""Adamax."""

from typing import Any, Unpack

import torch

from trainopt import originals
from trainopt.optim.base import Fused
from trainopt.optim.options import UnfusedExtras


class Adamax(Fused, originals.Adamax, rule="adamax"):
    """torch.optim.Adamax with a fused step: Adam with the largest recent gradient in place of the second moment.

    Every argument, default, error and state key is that of `torch.optim.Adamax`. With gradient g, at a parameter's step
    t::

        m = beta1 * m + (1 - beta1) * g
        u = max(beta2 * u, abs(g) + eps)
        p = p - lr / (1 - beta1**t) * m / u

    Keyword-only, beyond torch, and in each parameter group like any other option:

    Args:
        fused: with True (default None), GradScaler leaves its scale, and what it has found, to the step.
        l1, l1_proximal, noise, seed, skip_nonfinite, max_grad_norm, error_if_nonfinite, zero_grad, ema_decay,
            ema_warmup, state_dtype, precision, cautious, cautious_weight_decay, stats: as in `trainopt.SGD`.

    The states m and u (``exp_avg``, ``exp_inf``) have the parameter's dtype; arithmetic is float32, or float64 for
    float64 parameters. Source of the formula: Kingma & Ba, Adam: a method for stochastic optimization, 2015.
    """

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        **extras: Unpack[UnfusedExtras],
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
            capturable=capturable,
            **extras,
        )
