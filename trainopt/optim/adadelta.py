"""Adadelta."""

from typing import Any, Unpack

import torch

from trainopt import originals
from trainopt.optim.base import Fused
from trainopt.optim.options import UnfusedExtras


class Adadelta(Fused, originals.Adadelta, rule="adadelta"):
    """torch.optim.Adadelta with a fused step: a step of the size that its own steps have had.

    Every argument, default, error and state key is that of `torch.optim.Adadelta`. With gradient g, at a parameter's
    step t::

        v = rho * v + (1 - rho) * g**2
        u = sqrt(a + eps) / sqrt(v + eps) * g
        a = rho * a + (1 - rho) * u**2
        p = p - lr * u

    Keyword-only, beyond torch, and in each parameter group like any other option:

    Args:
        fused: with True (default None), GradScaler leaves its scale, and what it has found, to the step.
        l1, l1_proximal, noise, seed, skip_nonfinite, max_grad_norm, error_if_nonfinite, zero_grad, ema_decay,
            ema_warmup, state_dtype, precision, cautious, cautious_weight_decay, stats: as in `trainopt.SGD`.

    The states v and a (``square_avg``, ``acc_delta``) have the parameter's dtype; arithmetic is float32, or float64
    for float64 parameters. Source of the formula: Zeiler, ADADELTA: an adaptive learning rate method, 2012,
    arXiv:1212.5701.
    """

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
        **extras: Unpack[UnfusedExtras],
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            rho=rho,
            eps=eps,
            weight_decay=weight_decay,
            foreach=foreach,
            capturable=capturable,
            maximize=maximize,
            differentiable=differentiable,
            **extras,
        )
