"""Adam."""

from typing import Any, ClassVar

import torch

from trainopt import originals
from trainopt.optim.base import Fused
from trainopt.optim.extras import ADAM


class AdamRule(Fused):
    """What Adam and AdamW share: they are one rule, with weight decay in another place."""

    _rule = "adam"
    _states = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    EXTRAS: ClassVar[dict[str, Any]] = ADAM

    def _states_needed(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self._states if group["amsgrad"] else self._states[:2]


class Adam(AdamRule, originals.Adam):
    """torch.optim.Adam with a fused step.

    Every argument, default, error and state key is that of `torch.optim.Adam`. Keyword-only, beyond torch, and in each
    parameter group like any other option:

    Args:
        bias_correction: with False the moments are taken as they are, ``p -= lr * m / (sqrt(v) + eps)`` (default True).
        l1, l1_proximal, noise, seed, skip_nonfinite: as in `trainopt.SGD`.

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
        bias_correction: bool = True,
        l1: float = 0.0,
        l1_proximal: bool = False,
        noise: float = 0.0,
        seed: int = 0,
        skip_nonfinite: bool = False,
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
            extras={
                "bias_correction": bias_correction,
                "l1": l1,
                "l1_proximal": l1_proximal,
                "noise": noise,
                "seed": seed,
                "skip_nonfinite": skip_nonfinite,
            },
        )
