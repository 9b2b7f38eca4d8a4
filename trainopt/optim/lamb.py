"""LAMB."""

import math
from typing import Any, Unpack

import torch

from trainopt.optim.base import Fused
from trainopt.optim.options import PlainOptions, extra
from trainopt.optim.plain import bias_correction
from trainopt.optim.trust import norms


class LAMB(Fused, rule="lamb"):
    """LAMB (You et al. 2020, arXiv:1904.00962) with a fused step: Adam's update, as long as the parameter is.

    With gradient g and the moments m and v, the states ``exp_avg`` and ``exp_avg_sq``, at a parameter's step t::

        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        u = (m / (1 - beta1**t)) / (sqrt(v / (1 - beta2**t)) + eps) + weight_decay * p
        p = p - lr * norm(p) / norm(u) * u

    The norms are of the whole parameter, a DTensor's over all its shards. The trust ratio ``norm(p) / norm(u)`` is 1 if
    either norm is 0, and in groups with ``weight_decay=0``, unless ``always_adapt``: the convention of the authors' own
    code, of NVIDIA's apex (``FusedLAMB``) and of timm (``Lamb``), whose names and defaults these are. What differs
    there: apex and timm first clip all gradients to a norm of 1, which ``max_grad_norm=1.0`` does here; apex calls
    ``always_adapt`` ``use_nvlamb``. DeepSpeed bounds the trust ratio by 0.01 and 10. pytorch-optimizer bounds the
    parameter's norm by 10, adds eps to the update's, and leaves out the bias corrections.

    Args:
        params: tensors, or dicts with ``params`` and options of their own, as every optimizer of torch takes them.
        lr: the learning rate, a number or a tensor of one element (default 1e-3), at least 0.
        bias_correction: with False the moments are taken as they are (default True).
        betas: of the two moments (default (0.9, 0.999)), each at least 0 and less than 1.
        eps: added to the root of the second moment (default 1e-6), at least 0.
        weight_decay: in the update, and so in its norm (default 0.01), at least 0.
        grad_averaging: with False (default True), the gradient is added to the first moment whole, not times 1 - beta1.
        trust_clip: with True (default False), a trust ratio above 1 is taken for 1.
        always_adapt: with True (default False), the trust ratio holds without weight decay too, as in the paper.
        decoupled_decay: with True (default False), decays the parameter before the update, as AdamW does, and not in
            the update. The trust ratio has the norm of the decayed parameter.
        maximize, foreach, capturable, differentiable, fused: as `torch.optim.AdamW` has them.
        l1, l1_proximal, noise, seed, skip_nonfinite, max_grad_norm, error_if_nonfinite, zero_grad, ema_decay,
            ema_warmup, state_dtype, precision, cautious, cautious_weight_decay, stats: as in `trainopt.SGD`.

    Raises:
        ValueError: an option is out of its range.

    Moments have the parameter's dtype; arithmetic is float32, or float64 for float64 parameters, and norms are float64.
    """

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        grad_averaging: bool = True,
        *,
        trust_clip: bool = False,
        always_adapt: bool = False,
        decoupled_decay: bool = False,
        **options: Unpack[PlainOptions],
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            bias_correction=bias_correction,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            grad_averaging=grad_averaging,
            trust_clip=trust_clip,
            always_adapt=always_adapt,
            decoupled_decay=decoupled_decay,
            **options,
        )

    @staticmethod
    def plain_step(param: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """One parameter's step in plain torch, in place: what the engine does, for whatever it does not take."""
        (beta1, beta2), step = map(float, group["betas"]), float(state["step"])
        m, v = state["exp_avg"], state["exp_avg_sq"]
        m.copy_(m * beta1 + (gradient * (1 - beta1) if group.get("grad_averaging", True) else gradient))
        v.copy_(v * beta2 + gradient * (1 - beta2) * gradient)

        def correction(beta: float) -> float:
            return bias_correction(beta, step) if extra(group, "bias_correction") else 1.0

        update = m * (1 / correction(beta1)) / (v.sqrt() * (1 / math.sqrt(correction(beta2))) + group["eps"])
        if group["weight_decay"] != 0 and group["decoupled_decay"]:
            param.mul_(1 - group["lr"] * group["weight_decay"])
        elif group["weight_decay"] != 0:
            update = update + param * group["weight_decay"]
        ratio: Any = 1.0
        if group["weight_decay"] != 0 or group["always_adapt"]:
            length, of_update, _ = norms(param, update)
            ratio = length / of_update
            if group["trust_clip"]:
                ratio = ratio.clamp(max=1.0)
        param.sub_(update * (group["lr"] * ratio))
