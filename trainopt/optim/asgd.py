"""ASGD."""

from typing import Any, Unpack

import torch

from trainopt import originals
from trainopt.optim.base import Fused
from trainopt.optim.distributed import reals_of
from trainopt.optim.options import UnfusedExtras


class ASGD(Fused, originals.ASGD, rule="asgd"):
    """torch.optim.ASGD with a fused step: SGD that averages its parameters from step t0 on.

    Every argument, default, error and state key is that of `torch.optim.ASGD`. With gradient g, at a parameter's step
    t, and eta and mu as the step before has left them (at first lr and 1)::

        p = (1 - lambd * eta) * p - eta * g
        ax = ax + mu * (p - ax)
        eta = lr / (1 + lambd * lr * t)**alpha
        mu = 1 / max(1, t - t0)

    Keyword-only, beyond torch, and in each parameter group like any other option:

    Args:
        fused: with True (default None), GradScaler leaves its scale, and what it has found, to the step.
        l1, l1_proximal, noise, seed, skip_nonfinite, max_grad_norm, error_if_nonfinite, zero_grad, ema_decay,
            ema_warmup, state_dtype, precision, cautious, cautious_weight_decay, stats: as in `trainopt.SGD`.

    As in torch's, a learning rate that is changed has its effect one step later. The average ``ax`` has the parameter's
    dtype, and takes in what the formula makes of the parameter, as far as ``cautious`` lets it, before the proximal
    form of L1 and noise. ``eta`` and ``mu`` are float32 numbers beside the parameter, and stay float32 where a state
    dict is loaded for 16-bit parameters. Arithmetic is float32, or float64 for float64 parameters. Source of the
    formula: Polyak & Juditsky, Acceleration of stochastic approximation by averaging, 1992.
    """

    _beside = ("step", "eta", "mu")

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-2,
        lambd: float = 1e-4,
        alpha: float = 0.75,
        t0: float = 1e6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        **extras: Unpack[UnfusedExtras],
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            lambd=lambd,
            alpha=alpha,
            t0=t0,
            weight_decay=weight_decay,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
            capturable=capturable,
            **extras,
        )

    def _begin_at(self, group: dict[str, Any]) -> dict[str, Any]:
        return {"eta": group["lr"], "mu": 1.0}

    def _begin_first_step(self, state: dict[str, Any], group: dict[str, Any]) -> None:
        state["eta"].copy_(torch.tensor(float(group["lr"])))

    @staticmethod
    def plain_step(param: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """The update alone, in plain torch and in place: where torch's step would average what it makes of it."""
        param.sub_(gradient * state["eta"])

    def _decay_share(self, state: dict[str, Any], group: dict[str, Any]) -> float:
        return float(group["lambd"]) * float(state["eta"])

    def _settle(self, param: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        average, lr, step = reals_of(state["ax"]), float(group["lr"]), float(state["step"])
        average.copy_(param if state["mu"] == 1 else average + (param - average) * state["mu"])
        state["eta"].copy_(torch.tensor(lr / (1 + group["lambd"] * lr * step) ** group["alpha"]))
        state["mu"].copy_(torch.tensor(1 / max(1.0, step - group["t0"])))
