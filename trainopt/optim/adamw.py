"""AdamW."""

from typing import Any, Unpack

import torch

from trainopt import originals
from trainopt.optim.base import Fused
from trainopt.optim.options import AdamExtras


class AdamW(Fused, originals.AdamW, rule="adam"):
    """torch.optim.AdamW with a fused step: Adam with decoupled weight decay.

    Every argument, default, error and state key is that of `torch.optim.AdamW`. Keyword-only beyond torch:
    `bias_correction`, as in `trainopt.Adam`, and `l1`, `l1_proximal`, `noise`, `seed`, `skip_nonfinite`,
    `max_grad_norm`, `error_if_nonfinite`, `zero_grad`, `ema_decay`, `ema_warmup`, `state_dtype`, `precision`,
    `cautious`, `cautious_weight_decay` and `stats`, as in `trainopt.SGD`. Source of the formula: Loshchilov & Hutter,
    Decoupled weight decay regularization, 2019, with torch's conventions.
    """

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **extras: Unpack[AdamExtras],
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            **extras,
        )
