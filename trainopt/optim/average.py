"""The moving average of the parameters that a step keeps (``ema_decay``): how it begins, its plain form, its use.

The state "ema" of a parameter, float32 for a 16-bit one. The formula is `trainopt.training.average.WeightAverage`'s,
with the parameter's own count of steps for t; csrc/rules/average.h has it for the engine.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from trainopt.optim.options import extra

#: Its key in a parameter's state.
KEY = "ema"


def averages(group: dict[str, Any]) -> bool:
    """Whether a group's parameters have an average."""
    return extra(group, "ema_decay") is not None


def dtype_of(param: Tensor) -> torch.dtype:
    """float32 for a 16-bit parameter, in which an average's small steps would be lost; else the parameter's own."""
    return torch.float32 if param.dtype in (torch.float16, torch.bfloat16) else param.dtype


def new_average(param: Tensor) -> Tensor:
    """The parameter as it is: in its first step the average forgets it, and one that begins later goes on from it."""
    return param.detach().to(dtype_of(param), copy=True, memory_format=torch.preserve_format)


def weight_at(group: dict[str, Any], t: float) -> float:
    """How far the average goes towards the parameter in step t = 1, 2, …."""
    decay = decay_now = float(extra(group, "ema_decay"))
    n = 0.0  # the steps in which the warm-up decides: the product of i / (9 + i) over them is one of nine factors
    log_product = 0.0
    if extra(group, "ema_warmup"):
        n = min(t, math.floor(9 * decay / (1 - decay)))
        decay_now = min(decay, t / (9 + t))
        log_product = sum(math.log(j / (n + j)) for j in range(1, 10))
    if t > n:
        log_product += (t - n) * (math.log(decay) if decay > 0 else -math.inf)
    return (1 - decay_now) / -math.expm1(log_product)


def update_(param: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
    """Moves a parameter's average towards it, after a step of torch's."""
    average = state[KEY]
    average.lerp_(param.detach().to(average.dtype), weight_at(group, float(state["step"])))


@contextmanager
def applied(optimizer: Any) -> Iterator[None]:
    """The parameters are their averages inside, and afterwards the same bits as before, whatever happens."""
    params = [
        (param, optimizer.state[param][KEY])
        for group in optimizer.param_groups
        for param in group["params"]
        if averages(group) and KEY in optimizer.state.get(param, {})
    ]
    record = optimizer._record
    if record.holds_averages:
        raise RuntimeError("averaged_parameters: the parameters are the averages already")
    with kept([param for param, _ in params]):
        record.holds_averages = True
        try:
            with torch.no_grad():
                for param, average in params:
                    param.copy_(average)
            yield
        finally:
            record.holds_averages = False


@contextmanager
def kept(params: Sequence[Tensor]) -> Iterator[None]:
    """Whatever happens to the parameters inside, afterwards they have the same bits as before."""
    before = [param.detach().clone() for param in params]
    try:
        yield
    finally:
        with torch.no_grad():
            for param, value in zip(params, before, strict=True):
                param.copy_(value)


def averages_by_name(optimizer: Any) -> dict[str | int, Tensor]:
    """A copy of every parameter's average, or of the parameter where it has none."""
    found: dict[str | int, Tensor] = {}
    for group in optimizer.param_groups:
        names = group.get("param_names") or range(len(found), len(found) + len(group["params"]))
        for name, param in zip(names, group["params"], strict=True):
            own = optimizer.state.get(param, {}).get(KEY) if averages(group) else None
            found[name] = (param if own is None else own).detach().clone()
    return found
