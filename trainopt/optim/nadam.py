"""NAdam."""

from typing import Any, Unpack

import torch

from trainopt import originals
from trainopt.optim.base import Fused
from trainopt.optim.options import UnfusedExtras


class NAdam(Fused, originals.NAdam, rule="nadam"):
    """torch.optim.NAdam with a fused step: Adam with Nesterov's momentum, which rises over the run.

    Every argument, default, error and state key is that of `torch.optim.NAdam`. With gradient g, at a parameter's step
    t::

        mu[t] = beta1 * (1 - 0.96**(t * momentum_decay) / 2)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        u = (1 - mu[t]) * g / (1 - mu[1] * ... * mu[t]) + mu[t + 1] * m / (1 - mu[1] * ... * mu[t + 1])
        p = p - lr * u / (sqrt(v / (1 - beta2**t)) + eps)

    Keyword-only, beyond torch, and in each parameter group like any other option:

    Args:
        fused: with True (default None), GradScaler leaves its scale, and what it has found, to the step.
        l1, l1_proximal, noise, seed, skip_nonfinite, max_grad_norm, error_if_nonfinite, zero_grad, ema_decay,
            ema_warmup, state_dtype, precision, cautious, cautious_weight_decay, stats: as in `trainopt.SGD`.

    The states m and v (``exp_avg``, ``exp_avg_sq``) have the parameter's dtype; the product of all mu so far
    (``mu_product``) is one float32 number for a parameter, which stays float32 where a state dict is loaded for 16-bit
    parameters. Arithmetic is float32, or float64 for float64 parameters. Source of the formula: Dozat, Incorporating
    Nesterov momentum into Adam, 2016.
    """

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
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
            momentum_decay=momentum_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            **extras,
        )

    def _begin_at(self, group: dict[str, Any]) -> dict[str, Any]:
        return {"mu_product": 1.0}
