"""Adafactor."""

import math
from typing import Any, Unpack

import torch

from trainopt import originals
from trainopt.optim import precision
from trainopt.optim.base import Fused
from trainopt.optim.options import UnfusedExtras
from trainopt.optim.trust import sum_of_squares


class Adafactor(Fused, originals.Adafactor, rule="adafactor"):
    """torch.optim.Adafactor with a fused step: second moments of a matrix in one number a row and one a column.

    Every argument, default, error and state key is that of `torch.optim.Adafactor`. With gradient g, at a parameter's
    step t, w = t**beta2_decay, R(x) the root of the mean of x's squares over the parameter, and eps1, eps2 = eps::

        row = row + w * (mean(g**2, -1) - row)
        col = col + w * (mean(g**2, -2) - col)
        v = row * col / max(mean(row, -2), eps1)
        u = g / sqrt(max(v, eps1**2))
        p = p * (1 - lr * weight_decay) - max(eps2, R(p)) * min(lr, 1 / sqrt(t)) / max(1, R(u) / d) * u

    A parameter of one dimension, or of none, has in place of row and col v itself, an average of g**2 with the same
    weight. Of more than two dimensions the last two are the matrix. An eps1 of None is the machine epsilon of the
    parameter's dtype (of float32 where it has more than its own 16 bits, by `precision`).

    Keyword-only, beyond torch, and in each parameter group like any other option:

    Args:
        fused: with True (default None), GradScaler leaves its scale, and what it has found, to the step.
        l1, l1_proximal, noise, seed, skip_nonfinite, max_grad_norm, error_if_nonfinite, zero_grad, ema_decay,
            ema_warmup, state_dtype, precision, cautious, cautious_weight_decay, stats: as in `trainopt.SGD`.

    The states (``row_var`` and ``col_var``, or ``variance``) have the parameter's dtype; of a `state_dtype` of fewer
    bits than float32 only ``variance`` makes use. Arithmetic is float32, or float64 for float64 parameters; sums are
    float64. Of a DTensor sums are over the whole, and every rank has ``row_var`` and ``col_var`` of the whole; a shard
    has to be a block of rows and columns of matrices that lie beside each other, as any of one or two dimensions is.
    Source of the formula: Shazeer & Stern, Adafactor: Adaptive learning rates with sublinear memory cost, 2018,
    arXiv:1804.04235.
    """

    _reads_parameter = True
    _torch_takes_shards = False  # torch's takes a shard's norms for those of the whole, where it does not refuse it

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        **extras: Unpack[UnfusedExtras],
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            beta2_decay=beta2_decay,
            eps=eps,
            d=d,
            weight_decay=weight_decay,
            foreach=foreach,
            maximize=maximize,
            **extras,
        )

    def _options_for(self, group: dict[str, Any], param: torch.Tensor) -> dict[str, Any]:
        eps1, eps2 = group["eps"]
        if eps1 is None:
            eps1 = torch.finfo(param.dtype if precision.of(group, param) == "native" else torch.float32).eps
        return {"eps": (eps1, eps2)}

    @staticmethod
    def plain_step(param: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """One parameter's step in plain torch, in place: for cautious groups, which torch's own step has none for, and
        for DTensors that the engine does not take."""
        count, lr, (eps1, eps2) = float(state["step"]), float(group["lr"]), group["eps"]
        weight = count ** group["beta2_decay"]
        size = max(eps2, _size(param)) * min(lr, count**-0.5)
        param.mul_(1 - lr * group["weight_decay"])
        square = gradient.square()
        if gradient.dim() > 1:
            row, col = state["row_var"], state["col_var"]
            row.lerp_(square.mean(-1, keepdim=True), weight)
            col.lerp_(square.mean(-2, keepdim=True), weight)
            v = row / row.mean(-2, keepdim=True).clamp(min=eps1) * col
        else:
            v = state["variance"].lerp_(square, weight)
        update = gradient / v.clamp(min=eps1**2).sqrt()
        param.sub_(update, alpha=size / max(1.0, _size(update) / group["d"]))


def _size(tensor: torch.Tensor) -> float:
    """The root of the mean of the squares."""
    return math.sqrt(float(sum_of_squares(tensor)) / max(1, tensor.numel()))
