"""LARS."""

from typing import Any, Unpack

import torch

from trainopt.optim.base import Fused
from trainopt.optim.options import PlainOptions
from trainopt.optim.trust import norms


class LARS(Fused, rule="lars"):
    """LARS (You, Gitman, Ginsburg 2017, arXiv:1708.03888) with a fused step: SGD, of gradients as long as a part of
    the parameter.

    With gradient g and b, the state ``momentum_buffer`` where there is momentum::

        trust = trust_coeff * norm(p) / (norm(g) + weight_decay * norm(p) + eps)
        d = trust * (g + weight_decay * p)
        b = momentum * b + (1 - dampening) * d        # d itself in the first step
        p = p - lr * b                                # with nesterov, lr * (d + momentum * b)

    The norms are of the whole parameter, a DTensor's over all its shards. The trust ratio is 1 if either norm is 0, and
    in groups with ``weight_decay=0``, unless ``always_adapt``. Names, defaults and conventions are those of timm's
    ``Lars``; torch has no LARS. What differs elsewhere: apex's ``LARC`` wraps another optimizer, with a trust
    coefficient of 0.02 and ``trust_clip``; pytorch-optimizer has no weight decay in the denominator and leaves
    parameters of one dimension alone; bitsandbytes bounds the update's norm instead.

    Args:
        params: tensors, or dicts with ``params`` and options of their own, as every optimizer of torch takes them.
        lr: the learning rate, a number or a tensor of one element (default 1.0), at least 0.
        momentum: of the average of updates (default 0), at least 0.
        dampening: of a gradient on its way into that average (default 0).
        weight_decay: in the gradient, before it is scaled (default 0), at least 0.
        nesterov: with True, Nesterov's form of momentum (default False), which needs momentum and no dampening.
        trust_coeff: the length of a gradient as a part of the parameter's (default 0.001), at least 0.
        eps: added to the denominator (default 1e-8), at least 0.
        trust_clip: with True (default False), the learning rate times the trust ratio is 1 or less times the learning
            rate: ``trust`` becomes ``min(trust / lr, 1)``.
        always_adapt: with True (default False), the trust ratio holds without weight decay too.
        maximize, foreach, capturable, differentiable, fused: as `torch.optim.SGD` has them.
        l1, l1_proximal, noise, seed, skip_nonfinite, max_grad_norm, error_if_nonfinite, zero_grad, ema_decay,
            ema_warmup, state_dtype, precision, cautious, cautious_weight_decay, stats: as in `trainopt.SGD`.

    Raises:
        ValueError: an option is out of its range.

    The buffer has the parameter's dtype; arithmetic is float32, or float64 for float64 parameters; norms are float64.
    """

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1.0,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        trust_coeff: float = 0.001,
        eps: float = 1e-8,
        trust_clip: bool = False,
        always_adapt: bool = False,
        **options: Unpack[PlainOptions],
    ) -> None:
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        super().__init__(
            params,
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            trust_coeff=trust_coeff,
            eps=eps,
            trust_clip=trust_clip,
            always_adapt=always_adapt,
            **options,
        )

    def _first_step_differs(self, group: dict[str, Any]) -> bool:
        return bool(group["momentum"] != 0 and group["dampening"] != 0)  # the first gradient is taken undampened

    @staticmethod
    def plain_step(param: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """One parameter's step in plain torch, in place: what the engine does, for whatever it does not take."""
        decay, momentum = group["weight_decay"], group["momentum"]
        ratio: Any = 1.0
        if decay != 0 or group["always_adapt"]:
            length, of_gradient, exist = norms(param, gradient)
            ratio = group["trust_coeff"] * length / (of_gradient + length * decay + group["eps"])
            ratio = torch.where(exist, ratio, 1.0)
            if group["trust_clip"]:
                ratio = torch.where(ratio >= group["lr"], 1.0, ratio / group["lr"])
        update = (gradient + param * decay if decay != 0 else gradient) * ratio
        if momentum != 0:
            buffer = state["momentum_buffer"]
            buffer.copy_(update if state["first_step"] else buffer * momentum + update * (1 - group["dampening"]))
            update = update + buffer * momentum if group["nesterov"] else buffer
        param.sub_(update * group["lr"])
