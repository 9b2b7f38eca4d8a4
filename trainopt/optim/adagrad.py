"""Adagrad."""

from typing import Any, Unpack

import torch

from trainopt import originals
from trainopt.optim import traced
from trainopt.optim.base import Fused
from trainopt.optim.options import Extras, extra
from trainopt.optim.state_dtype import cast_states


class Adagrad(Fused, originals.Adagrad, rule="adagrad"):
    """torch.optim.Adagrad with a fused step: the gradient, divided by the root of all its squares so far.

    Every argument, default, error and state key is that of `torch.optim.Adagrad`, which makes its states at once. With
    gradient g, at a parameter's step t::

        v = v + g**2
        p = p - lr / (1 + (t - 1) * lr_decay) * g / (sqrt(v) + eps)

    Keyword-only, beyond torch, and in each parameter group like any other option:

    Args:
        l1, l1_proximal, noise, seed, skip_nonfinite, max_grad_norm, error_if_nonfinite, zero_grad, ema_decay,
            ema_warmup, state_dtype, precision, cautious, cautious_weight_decay, stats: as in `trainopt.SGD`.

    The state v (``sum``, which begins at ``initial_accumulator_value``, also where a parameter is added later) has the
    parameter's dtype; arithmetic is float32, or float64 for float64 parameters. Source of the formula: Duchi, Hazan &
    Singer, Adaptive subgradient methods for online learning and stochastic optimization, 2011.
    """

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **extras: Unpack[Extras],
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            lr_decay=lr_decay,
            weight_decay=weight_decay,
            initial_accumulator_value=initial_accumulator_value,
            eps=eps,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
            fused=fused,
            **extras,
        )
        for _, group, param in self._enumerate():  # torch has made their states
            if extra(group, "state_dtype") is not None:
                cast_states(self, self.state[param], group, param)
            if extra(group, "skip_nonfinite"):  # a device that decides on steps counts them
                self.state[param]["step"] = self._new_count(param, group)

    def _begin_at(self, group: dict[str, Any]) -> dict[str, Any]:
        return {"sum": self.defaults["initial_accumulator_value"]}

    def _init_group(self, group: dict[str, Any], *lists: Any) -> Any:
        if lists[-1] != traced.GATHER:
            for param in group["params"]:  # torch 2.11 makes none of parameters that have been added later
                if param.grad is not None and not self.state.get(param):
                    self._start(param, group)
        return super()._init_group(group, *lists)
