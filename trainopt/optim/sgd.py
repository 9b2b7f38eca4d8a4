"""Stochastic gradient descent."""

from typing import Any

import torch

from trainopt import originals
from trainopt.optim.base import Fused, new_step_count
from trainopt.optim.extras import extra
from trainopt.optim.reference import widen_count


class SGD(Fused, originals.SGD):
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

    The momentum buffer has the parameter's dtype; arithmetic is float32, or float64 for float64 parameters.
    """

    _rule = "sgd"
    _states = ("momentum_buffer",)
    _counts_steps = False

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
        l1: float = 0.0,
        l1_proximal: bool = False,
        noise: float = 0.0,
        seed: int = 0,
        skip_nonfinite: bool = False,
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
            extras={
                "l1": l1,
                "l1_proximal": l1_proximal,
                "noise": noise,
                "seed": seed,
                "skip_nonfinite": skip_nonfinite,
            },
        )

    def _states_needed(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self._states if group["momentum"] != 0 else ()

    def _first_step_differs(self, group: dict[str, Any]) -> bool:
        return bool(group["momentum"] != 0 and group["dampening"] != 0)

    def _is_torchs(self, group: dict[str, Any], param: torch.Tensor) -> bool:
        return False  # torch's SGD makes whatever is missing

    def _start(self, param: torch.Tensor, group: dict[str, Any]) -> bool:
        if extra(group, "noise") != 0:
            self._start_count(param, group)
        is_first = bool(self._states_needed(group)) and self.state[param].get("momentum_buffer") is None
        if is_first:
            buffer = torch.zeros_like(param.detach(), memory_format=torch.preserve_format)
            self.state[param]["momentum_buffer"] = buffer
        return is_first

    def _start_count(self, param: torch.Tensor, group: dict[str, Any]) -> None:
        """Counts this parameter's steps from now on. torch's SGD does not; the noise depends on the count."""
        state = self.state[param]
        if "step" not in state:
            state["step"] = new_step_count(param, group) + float(state.get("momentum_buffer") is not None)
        widen_count(state, group)

    def init_state(self) -> None:
        for _, group, param in self._enumerate():
            if param.requires_grad:
                self._start_before_first_step(param, group)

    init_state.__doc__ = Fused.init_state.__doc__

    def _start_before_first_step(self, param: torch.Tensor, group: dict[str, Any]) -> bool:
        # The first step takes the gradient undampened: a count of 0 tells a buffer of zeros that it is a first one.
        if group["dampening"] != 0 and not self.state.get(param):
            self._start_count(param, group)
        return self._start(param, group)
