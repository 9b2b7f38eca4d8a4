"""Adam."""

from typing import Any, Unpack

import torch

from trainopt import originals
from trainopt.optim.base import Fused
from trainopt.optim.options import AdamExtras


class Adam(Fused, originals.Adam, rule="adam"):
    """torch.optim.Adam with a fused step.

    Every argument, default, error and state key is that of `torch.optim.Adam`. Keyword-only, beyond torch, and in each
    parameter group like any other option:

    Args:
        bias_correction: with False the moments are taken as they are, ``p -= lr * m / (sqrt(v) + eps)`` (default True).
        l1, l1_proximal, noise, seed, skip_nonfinite, max_grad_norm, error_if_nonfinite, zero_grad, ema_decay,
            ema_warmup, state_dtype, precision, cautious, cautious_weight_decay, stats: as in `trainopt.SGD`.

    Moments have the parameter's dtype, and in float16 the second one underflows (docs/optimizers.md); arithmetic is
    float32, or float64 for float64 parameters. Source of the formula:
    Kingma & Ba, Adam: a method for stochastic optimization, 2015, with torch's conventions.
    """

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **extras: Unpack[AdamExtras],
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
            **extras,
        )
