"""Adan."""

from typing import Any, Unpack

import torch

from trainopt.optim.base import Fused
from trainopt.optim.options import PlainOptions
from trainopt.optim.plain import bias_correction


class Adan(Fused, rule="adan"):
    """Adan (Xie et al. 2022, arXiv:2208.06677) with a fused step: Adam that looks ahead by the gradient's change.

    With gradient g, the gradient before it h (which is g in the first step), and the averages m, d and n, at a
    parameter's step t::

        m = beta1 * m + (1 - beta1) * g
        d = beta2 * d + (1 - beta2) * (g - h)
        n = beta3 * n + (1 - beta3) * (g + beta2 * (g - h))**2
        u = (m / (1 - beta1**t) + beta2 * d / (1 - beta2**t)) / (sqrt(n / (1 - beta3**t)) + eps)
        p = (p - lr * u) / (1 + lr * weight_decay)    # with no_prox: p * (1 - lr * weight_decay) - lr * u

    Names, defaults and states are those of the authors' package. Its ``max_grad_norm=0.0``, which does not clip, is
    ``max_grad_norm=None`` here; and a parameter whose first gradient comes late has its bias corrections from there on.

    Args:
        params: tensors, or dicts with ``params`` and options of their own, as every optimizer of torch takes them.
        lr: the learning rate, a number or a tensor of one element (default 1e-3), at least 0.
        betas: of the gradient's average, of its change's, and of the squares' (default (0.98, 0.92, 0.99)), each at
            least 0 and less than 1.
        eps: added to the root of the squares' average (default 1e-8), at least 0.
        weight_decay: decoupled from the gradient (default 0), at least 0.
        no_prox: decays before the update, as AdamW does, and not by a division after it (default False).
        maximize, foreach, capturable, differentiable, fused: as `torch.optim.AdamW` has them.
        l1, l1_proximal, noise, seed, skip_nonfinite, max_grad_norm, error_if_nonfinite, zero_grad, ema_decay,
            ema_warmup, state_dtype, precision, cautious, cautious_weight_decay, stats: as in `trainopt.SGD`.

    Raises:
        ValueError: an option is out of its range, or ``betas`` are not three.

    The states m, d, n and -h (``exp_avg``, ``exp_avg_diff``, ``exp_avg_sq``, ``neg_pre_grad``) have the parameter's
    dtype; arithmetic is float32, or float64 for float64 parameters.
    """

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor, float | torch.Tensor] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        no_prox: bool = False,
        **options: Unpack[PlainOptions],
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, no_prox=no_prox, **options)

    @staticmethod
    def plain_step(param: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """One parameter's step in plain torch, in place: what the engine does, for whatever it does not take."""
        (beta1, beta2, beta3), step, lr = map(float, group["betas"]), float(state["step"]), float(group["lr"])
        m, d, n, before = (state[name] for name in ("exp_avg", "exp_avg_diff", "exp_avg_sq", "neg_pre_grad"))
        difference = (gradient + before) * float(step > 1)
        ahead = gradient + difference * beta2
        m.copy_(m * beta1 + gradient * (1 - beta1))
        d.copy_(d * beta2 + difference * (1 - beta2))
        n.copy_(n * beta3 + ahead * (1 - beta3) * ahead)
        before.copy_(0 - gradient)  # no -0.0
        change = m * (lr / bias_correction(beta1, step)) + d * (lr * beta2 / bias_correction(beta2, step))
        change /= n.sqrt() * (1 / bias_correction(beta3, step) ** 0.5) + group["eps"]
        decay = lr * group["weight_decay"]
        if group["no_prox"]:
            param.mul_(1 - decay)
        elif decay != 0:
            change = (change + param * decay) * (1 / (1 + decay))
        param.sub_(change)
