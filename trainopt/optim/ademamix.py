"""AdEMAMix."""

import math
from typing import Any, Unpack

import torch

from trainopt.optim.base import Fused
from trainopt.optim.options import PlainOptions
from trainopt.optim.plain import bias_correction


class AdEMAMix(Fused, rule="ademamix"):
    """AdEMAMix (Pagliardini et al. 2024, arXiv:2409.03137) with a fused step: AdamW with a second, slow average.

    With gradient g, the fast and the slow average m and s, and v, at a parameter's step t::

        m = beta1 * m + (1 - beta1) * g
        s = beta3(t) * s + (1 - beta3(t)) * g
        v = beta2 * v + (1 - beta2) * g**2
        u = (m / (1 - beta1**t) + alpha(t) * s) / (sqrt(v / (1 - beta2**t)) + eps)
        p = p * (1 - lr * weight_decay) - lr * u

    alpha(t) rises evenly from 0 to ``alpha`` in ``alpha_warmup`` steps. beta3(t) rises in ``beta3_warmup`` steps from
    beta1 to beta3 in such a way that the average's half-life rises evenly. The paper has both for as long as the
    training takes. Names, defaults and states are those of the authors' package.

    Args:
        params: tensors, or dicts with ``params`` and options of their own, as every optimizer of torch takes them.
        lr: the learning rate, a number or a tensor of one element (default 1e-3), at least 0.
        betas: of the fast average, of the squares' and of the slow one (default (0.9, 0.999, 0.9999)), each at least 0
            and less than 1.
        alpha: the slow average's weight (default 2.0), at least 0.
        beta3_warmup, alpha_warmup: steps, at least 0 (default None: as 0, none).
        eps: added to the root of the second moment (default 1e-8), at least 0.
        weight_decay: decoupled from the gradient, as AdamW's (default 0), at least 0.
        maximize, foreach, capturable, differentiable, fused: as `torch.optim.AdamW` has them.
        l1, l1_proximal, noise, seed, skip_nonfinite, max_grad_norm, error_if_nonfinite, zero_grad, ema_decay,
            ema_warmup, state_dtype, precision, cautious, cautious_weight_decay, stats: as in `trainopt.SGD`.

    Raises:
        ValueError: an option is out of its range, or ``betas`` are not three.

    The states m, s and v (``exp_avg_fast``, ``exp_avg_slow``, ``exp_avg_sq``) have the parameter's dtype; arithmetic is
    float32, or float64 for float64 parameters. A slow average in bfloat16 stands still: it needs ``state_dtype``.
    """

    _may_be_none = frozenset({"beta3_warmup", "alpha_warmup"})

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999, 0.9999),
        alpha: float = 2.0,
        beta3_warmup: float | None = None,
        alpha_warmup: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Unpack[PlainOptions],
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            alpha=alpha,
            beta3_warmup=beta3_warmup or 0,
            alpha_warmup=alpha_warmup or 0,
            eps=eps,
            weight_decay=weight_decay,
            **options,
        )

    @staticmethod
    def plain_step(param: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """One parameter's step in plain torch, in place: what the engine does, for whatever it does not take."""
        (beta1, beta2, beta3), step, lr = map(float, group["betas"]), float(state["step"]), group["lr"]
        fast, slow, v = state["exp_avg_fast"], state["exp_avg_slow"], state["exp_avg_sq"]
        rest = 1 - beta3
        if (share := _share(group["beta3_warmup"], step)) < 1:
            half_life = (1 - share) * _half_life(beta1) + share * _half_life(beta3)
            rest = -math.expm1(math.log(0.5) / (half_life + 1))
        alpha = group["alpha"] * _share(group["alpha_warmup"], step)
        fast.copy_(fast * beta1 + gradient * (1 - beta1))
        slow.copy_(slow * (1 - rest) + gradient * rest)
        v.copy_(v * beta2 + gradient * (1 - beta2) * gradient)
        change = fast * (1 / bias_correction(beta1, step)) + slow * alpha
        change /= v.sqrt() * (1 / bias_correction(beta2, step) ** 0.5) + group["eps"]
        param.mul_(1 - lr * group["weight_decay"])
        param.sub_(change * lr)


def _share(warmup: float | None, step: float) -> float:
    """How far a warm-up of so many steps has come."""
    return step / warmup if warmup and step < warmup else 1.0


def _half_life(beta: float) -> float:
    """The steps after which an average with this beta has forgotten half, less one, as the authors' package has it."""
    return math.log(0.5) / math.log(beta + 1e-8) - 1
