"""The losses as modules: torch.nn's, over trainopt.functional. Arguments, attributes and state dicts are torch's."""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from trainopt import originals
from trainopt.losses import functional, linear, older_torch
from trainopt.losses.options import CrossEntropyOptions, check
from trainopt.stand_in import StandIn

if TYPE_CHECKING:
    from torch.nn import LinearCrossEntropyLoss as TorchLinearCrossEntropyLoss
    from torch.nn import LinearCrossEntropyOptions as LinearCrossEntropyOptions
else:
    TorchLinearCrossEntropyLoss = getattr(originals, "LinearCrossEntropyLoss", older_torch.LinearCrossEntropyLoss)
    LinearCrossEntropyOptions = getattr(torch.nn, "LinearCrossEntropyOptions", older_torch.LinearCrossEntropyOptions)


def _keywords(function: Callable[..., Any], *, but: tuple[str, ...] = ()) -> dict[str, Any]:
    """The keyword-only arguments of a function, with their defaults."""
    keywords = [each for each in inspect.signature(function).parameters.values() if each.kind is each.KEYWORD_ONLY]
    return {each.name: each.default for each in keywords if each.name not in but}


def _checked(extras: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Of the arguments of an __init__, the extras; ValueError for one that is out of its range."""
    found = {name: given[name] for name in extras}
    check(CrossEntropyOptions(**{name: found[name] for name in CrossEntropyOptions._fields if name in found}))
    return found


class _Ours(metaclass=StandIn):
    """What the modules have in common."""

    #: Options beyond torch's, as the function has them: keyword arguments of __init__, attributes of the same names.
    EXTRAS: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        for name, default in vars(cls).get("EXTRAS", {}).items():
            if name not in vars(cls):
                setattr(cls, name, default)  # for an object that torch's class has pickled

    def __prepare_scriptable__(self) -> Any:
        """torch's module for torch.jit.script, which compiles Python that ours is not; ours if torch's cannot do it."""
        cls = type(self)
        torch_class = next((base for base in cls.__mro__[1:] if base.__name__ == cls.__name__), cls)
        extras = any(getattr(self, name) != getattr(cls, name) for name in self.EXTRAS)
        if extras or cls.__module__ != __name__ or not torch_class.__module__.startswith("torch."):
            return self
        plain: Any = object.__new__(torch_class)
        plain.__dict__.update({name: value for name, value in vars(self).items() if name not in self.EXTRAS})
        return plain


_EXTRAS = _keywords(functional.cross_entropy)
_LINEAR_EXTRAS = _keywords(
    functional.linear_cross_entropy,
    but=("linear_bias", "weight", "reduction", "ignore_index", "label_smoothing", "options"),
)


class CrossEntropyLoss(_Ours, originals.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss over trainopt.functional.cross_entropy, which explains the options beyond torch's."""

    EXTRAS = _EXTRAS

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
        temperature: float = 1.0,
    ) -> None:
        extras = _checked(_EXTRAS, locals())
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        vars(self).update(extras)

    def forward(self, input: Tensor, target: Tensor) -> Any:
        """The loss; with return_z_loss the pair of it and its z-loss."""
        return functional.cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            **{name: getattr(self, name) for name in _EXTRAS},
        )


class MSELoss(_Ours, originals.MSELoss):
    """torch.nn.MSELoss over trainopt.functional.mse_loss."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss."""
        return functional.mse_loss(input, target, reduction=self.reduction)


class L1Loss(_Ours, originals.L1Loss):
    """torch.nn.L1Loss over trainopt.functional.l1_loss."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss."""
        return functional.l1_loss(input, target, reduction=self.reduction)


class SmoothL1Loss(_Ours, originals.SmoothL1Loss):
    """torch.nn.SmoothL1Loss over trainopt.functional.smooth_l1_loss."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss."""
        return functional.smooth_l1_loss(input, target, reduction=self.reduction, beta=self.beta)


class HuberLoss(_Ours, originals.HuberLoss):
    """torch.nn.HuberLoss over trainopt.functional.huber_loss."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss."""
        return functional.huber_loss(input, target, reduction=self.reduction, delta=self.delta)


class BCELoss(_Ours, originals.BCELoss):
    """torch.nn.BCELoss over trainopt.functional.binary_cross_entropy."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss."""
        return functional.binary_cross_entropy(input, target, self.weight, reduction=self.reduction)


class BCEWithLogitsLoss(_Ours, originals.BCEWithLogitsLoss):
    """torch.nn.BCEWithLogitsLoss over trainopt.functional.binary_cross_entropy_with_logits."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss."""
        return functional.binary_cross_entropy_with_logits(
            input, target, self.weight, reduction=self.reduction, pos_weight=self.pos_weight
        )


class KLDivLoss(_Ours, originals.KLDivLoss):
    """torch.nn.KLDivLoss over trainopt.functional.kl_div."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss."""
        return functional.kl_div(input, target, reduction=self.reduction, log_target=self.log_target)


class LinearCrossEntropyLoss(_Ours, TorchLinearCrossEntropyLoss):
    """torch.nn.LinearCrossEntropyLoss over trainopt.functional.linear_cross_entropy, which explains the options.

    The output layer and cross-entropy in one. It owns the layer (`linear`, a torch.nn.Linear), so that the hooks of
    wrappers that shard or offload parameters (FSDP, ZeRO) fire when it is called. The layer's weight can be tied:
    `loss.linear.weight = embedding.weight`. Where torch is older than its class (2.13), this one has the same
    arguments, attributes and state dict.

    Args:
        in_features: the width of the hidden states.
        num_classes: classes, or words of the vocabulary.
        out_features: (d1, …), for a K-dimensional loss; through torch.
        bias: whether the layer has one.
        device, dtype: of the layer's parameters.
        reduction, label_smoothing: as in CrossEntropyLoss.
        weight: a factor for each class, (num_classes); a buffer.
        ignore_index: targets of this class count for nothing; None is -100 for classes, and due for probabilities.
        options: torch.nn.LinearCrossEntropyOptions.
        z_loss, return_z_loss, softcap, empty, memory_budget, out_dtype, temperature: trainopt's own, as in the
            function.
    """

    EXTRAS = _LINEAR_EXTRAS

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        z_loss: float = 0.0,
        return_z_loss: bool = False,
        softcap: float | None = None,
        empty: str = "nan",
        memory_budget: int | None = None,
        out_dtype: torch.dtype | None = None,
        temperature: float = 1.0,
    ) -> None:
        extras = _checked(_LINEAR_EXTRAS, locals())
        linear.check_chunks(memory_budget, out_dtype)
        super().__init__(
            in_features,
            num_classes,
            out_features=out_features,
            bias=bias,
            device=device,
            dtype=dtype,
            reduction=reduction,
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            options=options,
        )
        vars(self).update(extras)

    def forward(self, input: Tensor, target: Tensor) -> Any:
        """The loss of hidden states, (N, in_features); with return_z_loss the pair of it and its z-loss."""
        linear_weight: Tensor = self.linear.weight
        linear_bias: Tensor | None = self.linear.bias
        linear.check_gathered(input, linear_weight)
        if self.out_features:
            linear_weight = linear_weight.reshape(self.num_classes, *self.out_features, self.linear.in_features)
            if linear_bias is not None:
                linear_bias = linear_bias.reshape(self.num_classes, *self.out_features)
        return functional.linear_cross_entropy(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            **{name: getattr(self, name) for name in _LINEAR_EXTRAS},
        )
