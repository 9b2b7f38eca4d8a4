"""Steps that are made only to have states: they change nothing, and are not counted.

torch.distributed.checkpoint and other tools call `step` before they save or load, so that there are states: with every
learning rate at 0 and gradients of 0. torch makes that step like any other. The first real one then comes with the
bias correction of the second, momenta have been damped, noise has moved the weights, and a schedule is a step ahead.

A step is taken for such a request if

- every learning rate is 0 (one that lies on a device other than the CPU is not read, and so is not known to be), and
- there is a gradient, and all gradients are 0 in every element (of DTensors, on every rank), and
- a parameter with a gradient still lacks the state that it needs, or no parameter has a state at all.

A warm-up that begins at a learning rate of 0 comes with gradients that are not 0, and its first step counts.
"""

from collections.abc import Callable
from typing import Any

import torch

from trainopt.optim.ranks import elements, on_any_rank


def asks_for_state(optimizer: Any, needs_state: Callable[[dict[str, Any]], bool] = lambda group: True) -> bool:
    """Whether the step that is about to be made is a request for states.

    Args:
        needs_state: whether the parameters of a group have states, by its options. By default every one may.
    """
    if not all(is_zero(group.get("lr", 1.0)) for group in optimizer.param_groups):
        return False
    state = optimizer.state
    gradients = []
    lacks = not state
    for group in optimizer.param_groups:
        needs = needs_state(group)
        for param in group["params"]:
            if param.grad is not None:
                gradients.append(param.grad)
                lacks = lacks or (needs and not state.get(param))
    if not (gradients and lacks):
        return False
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return not bool(on_any_rank(not all(map(is_all_zero, gradients)), params))


def is_zero(lr: float | torch.Tensor) -> bool:
    """Whether a learning rate is known to be 0, without waiting for a device."""
    if isinstance(lr, torch.Tensor):
        return lr.device.type == "cpu" and lr.numel() == 1 and float(lr.detach()) == 0
    return lr == 0


def is_all_zero(gradient: torch.Tensor) -> bool:
    """Whether every element that this rank has is 0."""
    return not gradient.is_meta and not bool(elements(gradient).any())
