"""The losses as modules: torch.nn's, over trainopt.functional. Arguments, attributes and state dicts are torch's."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from trainopt.losses import functional
from trainopt.losses.arguments import check_extras


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss over trainopt.functional.cross_entropy, which explains the options beyond torch's."""

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        return_z_loss: bool = False,
        softcap: float | None = None,
        inplace_backward: bool = False,
        empty: str = "nan",
    ) -> None:
        check_extras(z_loss, softcap, empty)
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.z_loss = z_loss
        self.return_z_loss = return_z_loss
        self.softcap = softcap
        self.inplace_backward = inplace_backward
        self.empty = empty

    def forward(self, input: Tensor, target: Tensor) -> Any:
        """The loss; with return_z_loss the pair of it and its z-loss."""
        return functional.cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            return_z_loss=self.return_z_loss,
            softcap=self.softcap,
            inplace_backward=self.inplace_backward,
            empty=self.empty,
        )


class MSELoss(nn.MSELoss):
    """torch.nn.MSELoss over trainopt.functional.mse_loss."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss."""
        return functional.mse_loss(input, target, reduction=self.reduction)


class L1Loss(nn.L1Loss):
    """torch.nn.L1Loss over trainopt.functional.l1_loss."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss."""
        return functional.l1_loss(input, target, reduction=self.reduction)


class SmoothL1Loss(nn.SmoothL1Loss):
    """torch.nn.SmoothL1Loss over trainopt.functional.smooth_l1_loss."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss."""
        return functional.smooth_l1_loss(input, target, reduction=self.reduction, beta=self.beta)


class HuberLoss(nn.HuberLoss):
    """torch.nn.HuberLoss over trainopt.functional.huber_loss."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss."""
        return functional.huber_loss(input, target, reduction=self.reduction, delta=self.delta)


class BCELoss(nn.BCELoss):
    """torch.nn.BCELoss over trainopt.functional.binary_cross_entropy."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss."""
        return functional.binary_cross_entropy(input, target, self.weight, reduction=self.reduction)


class BCEWithLogitsLoss(nn.BCEWithLogitsLoss):
    """torch.nn.BCEWithLogitsLoss over trainopt.functional.binary_cross_entropy_with_logits."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss."""
        return functional.binary_cross_entropy_with_logits(
            input, target, self.weight, reduction=self.reduction, pos_weight=self.pos_weight
        )


class KLDivLoss(nn.KLDivLoss):
    """torch.nn.KLDivLoss over trainopt.functional.kl_div."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss."""
        return functional.kl_div(input, target, reduction=self.reduction, log_target=self.log_target)


class LinearCrossEntropyLoss(nn.Module):
    """The output layer and cross-entropy in one: trainopt.functional.linear_cross_entropy, which explains the options.

    It owns the layer's weight, so that the hooks of wrappers that shard or offload parameters (FSDP, ZeRO) fire when it
    is called. The weight can be tied: `loss.weight = embedding.weight`.

    Args:
        in_features: the width of the hidden states.
        num_classes: classes, or words of the vocabulary.
        bias: whether the layer has one.
        device, dtype: of the parameters.
        class_weight: a factor for each class, (num_classes); a buffer.

    Attributes:
        weight: (num_classes, in_features), started as torch.nn.Linear starts it.
        bias: (num_classes), or None.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        return_z_loss: bool = False,
        softcap: float | None = None,
        empty: str = "nan",
        memory_budget: int = functional.MEMORY_BUDGET,
    ) -> None:
        check_extras(z_loss, softcap, empty)
        super().__init__()
        self.in_features = in_features
        self.num_classes = num_classes
        self.weight = nn.Parameter(torch.empty(num_classes, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_classes, device=device, dtype=dtype)) if bias else None
        self.class_weight: Tensor | None
        self.register_buffer("class_weight", class_weight)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.return_z_loss = return_z_loss
        self.softcap = softcap
        self.empty = empty
        self.memory_budget = memory_budget
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the parameters anew from the uniform distribution on ±1/√in_features, as torch.nn.Linear does."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features) if self.in_features > 0 else 0
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor, target: Tensor) -> Any:
        """The loss of hidden states (…, in_features); with return_z_loss the pair of it and its z-loss."""
        return functional.linear_cross_entropy(
            input,
            self.weight,
            target,
            self.bias,
            class_weight=self.class_weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            return_z_loss=self.return_z_loss,
            softcap=self.softcap,
            empty=self.empty,
            memory_budget=self.memory_budget,
        )

    def extra_repr(self) -> str:
        """The arguments of the layer and the reduction."""
        return (
            f"in_features={self.in_features}, num_classes={self.num_classes}, bias={self.bias is not None}, "
            f"reduction={self.reduction!r}"
        )
