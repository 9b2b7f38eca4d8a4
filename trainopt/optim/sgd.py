"""Stochastic gradient descent."""

from typing import Any, Unpack

import torch

from trainopt import originals
from trainopt.optim.base import Fused
from trainopt.optim.options import Extras


class SGD(Fused, originals.SGD, rule="sgd"):
    """torch.optim.SGD with a fused step: gradient descent with momentum, dampening and Nesterov's form.

    Every argument, default, error and state key is that of `torch.optim.SGD`; without momentum and over the full batch
    it is plain gradient descent. Keyword-only, beyond torch, and in each parameter group like any other option:

    Args:
        l1: weight of the L1 penalty (default 0). Adds ``l1 * sign(p)`` to the gradient, with sign(0) = 0.
        l1_proximal: with True, instead moves p towards 0 by ``lr * l1`` after the step, and to exactly 0 if it is
            nearer than that (soft-thresholding; Parikh & Boyd, Proximal Algorithms, 2014, section 6.5.2).
        noise: standard deviation of Gaussian noise that is added to the parameter after each step (default 0). A pure
            function of (seed, step, parameter, element): the same for any number of threads, after a resume, in every
            replica. The state dict then holds a "step" for each parameter.
        seed: of the noise (default 0), an integer from 0 to 2**64 - 1.
        skip_nonfinite: with True (default False), a step is left out if an element of a gradient is NaN or infinite:
            nothing changes, `last_step_skipped` says so, and schedules do not count it. Reads the gradients once more.
        max_grad_norm: the largest global norm of the gradients (default None: they are not clipped), over all groups
            that have a limit. They are scaled by ``min(1, max_grad_norm / (norm + 1e-6))`` as they are read, and stay
            as they are in memory; `grad_norm` has the norm.
        error_if_nonfinite: with True (default False), a norm that is NaN or infinite is a RuntimeError, before anything
            is changed.
        zero_grad: ``"in_step"`` clears the gradients as they are read, also in a step that is skipped (default None).
        ema_decay: the decay, in [0, 1), of a moving average of the parameters, free of bias, in the state "ema"
            (default None: there is none); `averaged_parameters` and `ema_state_dict` are its use.
        ema_warmup: with True (default False), the decay in step t is at most ``t / (9 + t)``.
        state_dtype: what states are stored in, "float32", "bfloat16", "float16" or "8bit", or the torch.dtype; or a
            dict of these by the name of the state (default None: the parameter's dtype). For parameters of the first
            three; 8 bits, with a scale for each 256 elements, from 4,096 elements on.
        precision: how 16-bit parameters are stored (default ``"native"``, as they are): ``"master"``, with what they
            lack of a float32 in the state "master"; ``"master24"``, with 8 bits more (bfloat16 only); or
            ``"stochastic"``, rounded at random, keyed by `seed`.
        cautious: with True (default False), elements of the update whose sign is not that of the gradient are left out,
            and the others are divided by the share of the parameter's elements that they are, or by 0.001 if that is
            more (Liang et al. 2024, arXiv:2411.16085). The gradient is what the formula sees: with decay that is
            coupled, L1 and the sign of `maximize`. Decoupled decay and noise are not touched.
        cautious_weight_decay: with True (default False), weight decay acts only where its sign is that of the update.
            For decay that is decoupled from the gradient (AdamW, Lion).
        stats: with True (default False), the step takes the norms of each gradient, parameter and update, for
            `optimizer.stats()`.

    The momentum buffer has the parameter's dtype; arithmetic is float32, or float64 for float64 parameters.
    """

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | torch.Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **extras: Unpack[Extras],
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
            **extras,
        )

    def _first_step_differs(self, group: dict[str, Any]) -> bool:
        return bool(group["momentum"] != 0 and group["dampening"] != 0)  # the first gradient is taken undampened
