"""NovoGrad."""

from typing import Any, Unpack

import torch

from trainopt.optim.base import Fused
from trainopt.optim.options import PlainOptions
from trainopt.optim.trust import sum_of_squares


class NovoGrad(Fused, rule="novograd"):
    """NovoGrad (Ginsburg et al. 2019, arXiv:1905.11286) with a fused step: Adam with one second moment for a tensor.

    With gradient g, the momentum m and the average square n, which is one number for each parameter::

        n = beta2 * n + (1 - beta2) * sum(g**2)    # while it is 0: sum(g**2); with amsgrad m takes the largest n so far
        m = beta1 * m + g / (sqrt(n) + eps) + weight_decay * p
        p = p - lr * m

    Names, defaults and conventions are those of NVIDIA's own code, which timm has as ``NvNovoGrad``. The paper begins
    m as the first summand, whatever ``grad_averaging``; here, as there, m begins at 0. NVIDIA's apex has other defaults
    and bias corrections.

    Args:
        params: tensors, or dicts with ``params`` and options of their own, as every optimizer of torch takes them.
        lr: the learning rate, a number or a tensor of one element (default 1e-3), at least 0.
        betas: of the momentum and of the average square (default (0.95, 0.98)), each at least 0 and less than 1.
        eps: added to the root of the average square (default 1e-8), at least 0.
        weight_decay: added to the scaled gradient, times the parameter (default 0), at least 0.
        grad_averaging: multiplies what is added to the momentum by 1 - beta1 (default False).
        amsgrad: divides by the root of the largest n so far (default False).
        decoupled_decay: decays the parameter before the update, as AdamW does (default False).
        maximize, foreach, capturable, differentiable, fused: as `torch.optim.AdamW` has them.
        l1, l1_proximal, noise, seed, skip_nonfinite, max_grad_norm, error_if_nonfinite, zero_grad, ema_decay,
            ema_warmup, state_dtype, precision, cautious, cautious_weight_decay, stats: as in `trainopt.SGD`.

    Raises:
        ValueError: an option is out of its range.

    The state m (``exp_avg``) has the parameter's dtype; n (``exp_avg_sq``) and, with amsgrad, the largest n so far
    (``max_exp_avg_sq``) are float32 beside the parameter, or float64 for float64 parameters, and so is the arithmetic.
    The sum of squares has the same bits for any number of threads and on every rank that has a shard of the parameter.
    """

    _beside = ("exp_avg_sq", "max_exp_avg_sq")

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.95, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        grad_averaging: bool = False,
        amsgrad: bool = False,
        decoupled_decay: bool = False,
        **options: Unpack[PlainOptions],
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            grad_averaging=grad_averaging,
            amsgrad=amsgrad,
            decoupled_decay=decoupled_decay,
            **options,
        )

    @staticmethod
    def plain_step(param: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """One parameter's step in plain torch, in place: what the engine does, for whatever it does not take."""
        (beta1, beta2), m, number = map(float, group["betas"]), state["exp_avg"], state["exp_avg_sq"]
        squares = sum_of_squares(gradient)
        before = number.to(squares)
        number.copy_(torch.where(before == 0, squares, before * beta2 + squares * (1 - beta2)))
        if group["amsgrad"]:
            largest = state["max_exp_avg_sq"]
            number = largest.copy_(torch.maximum(largest, number))
        update = gradient / (number.to(squares).sqrt() + group["eps"]).to(gradient.dtype)
        if group["decoupled_decay"]:
            param.mul_(1 - group["lr"] * group["weight_decay"])
        elif group["weight_decay"] != 0:
            update = update + param * group["weight_decay"]
        m.copy_(m * beta1 + (update * (1 - beta1) if group["grad_averaging"] else update))
        param.sub_(m * group["lr"])
