"""Lion."""

from typing import Any, Unpack

import torch

from trainopt.optim.base import Fused
from trainopt.optim.options import PlainOptions


class Lion(Fused, rule="lion"):
    """Lion (Chen et al. 2023, arXiv:2302.06675) with a fused step: moves each element by ``lr``, whatever its size.

    With gradient g and m, the state ``exp_avg``, which is zeros before the first step::

        p = p * (1 - lr * weight_decay)
        p = p - lr * sign(beta1 * m + (1 - beta1) * g)    # sign(0) = 0; a NaN stays a NaN
        m = beta2 * m + (1 - beta2) * g

    Names and defaults are those of the authors' package, lion-pytorch; torch has no Lion.

    Args:
        params: tensors, or dicts with ``params`` and options of their own, as every optimizer of torch takes them.
        lr: the learning rate, a number or a tensor of one element (default 1e-4), at least 0. The paper advises 3 to 10
            times less than for AdamW, and a weight decay as many times larger.
        betas: of the update and of the average (default (0.9, 0.99)), each at least 0 and less than 1.
        weight_decay: decoupled from the gradient, as AdamW's (default 0), at least 0.
        maximize, foreach, capturable, differentiable, fused: as `torch.optim.AdamW` has them.
        l1, l1_proximal, noise, seed, skip_nonfinite, max_grad_norm, error_if_nonfinite, zero_grad, ema_decay,
            ema_warmup, state_dtype, precision, cautious, cautious_weight_decay, stats: as in `trainopt.SGD`.

    Raises:
        ValueError: an option is out of its range.

    The average has the parameter's dtype; arithmetic is float32, or float64 for float64 parameters.
    """

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-4,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **options: Unpack[PlainOptions],
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay, **options)

    @staticmethod
    def plain_step(param: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """One parameter's step in plain torch, in place: what the engine does, for whatever it does not take."""
        (beta1, beta2), average = group["betas"], state["exp_avg"]
        direction = average * beta1 + gradient * (1 - beta1)
        direction = torch.where(direction.isnan(), direction, direction.sign())  # torch's sign makes a NaN 0
        param.mul_(1 - group["lr"] * group["weight_decay"])
        param.sub_(direction * group["lr"])
        average.mul_(beta2).add_(gradient * (1 - beta2))
