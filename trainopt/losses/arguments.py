"""What the losses check of their arguments, beyond what torch checks."""

import math
import warnings

from torch import Tensor
from torch.compiler import assume_constant_result, is_compiling
from torch.nn import _reduction

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def number_of(reduction: str) -> int:
    """torch's number for a reduction; its own error for one that it does not know."""
    number = _REDUCTIONS.get(reduction) if isinstance(reduction, str) else None
    return _number_by_torch(reduction) if number is None else number


def is_number(value: object) -> bool:
    """Whether it is a number of Python's; what else torch takes or refuses as one is left to torch."""
    return isinstance(value, (int, float))


# What follows may warn, and a compiler cannot trace a warning. It calls these while it traces, and keeps what they
# return: so they warn when a function is compiled, as torch's own losses do.


@assume_constant_result
def _number_by_torch(reduction: str) -> int:
    return _reduction.get_enum(reduction)


@assume_constant_result
def legacy_reduction(size_average: bool | None, reduce: bool | None) -> str:
    """The reduction that torch's deprecated arguments ask for, with torch's warning."""
    return _reduction.legacy_get_string(size_average, reduce)


def warn_of_broadcasting(input: Tensor, target: Tensor) -> None:
    """torch's warning about two shapes, in the name of who called the caller's caller."""
    if is_compiling():  # there, a size may be known at run time only
        return _warn("Using a target size that is different to the input size. " + _BROADCASTING, 1)
    return _warn(
        f"Using a target size ({target.size()}) that is different to the input size ({input.size()}). " + _BROADCASTING,
        5,
    )


def warn_of_mean() -> None:
    """torch's warning about the mean of kl_div, in the name of who called the caller."""
    _warn(
        "reduction: 'mean' divides the total loss by both the batch size and the support size."
        "'batchmean' divides only by the batch size, and aligns with the KL div math definition."
        "'mean' will be changed to behave the same as 'batchmean' in the next major release.",
        4,
    )


_BROADCASTING = "This will likely lead to incorrect results due to broadcasting. Please ensure they have the same size."


@assume_constant_result
def _warn(message: str, stacklevel: int) -> None:
    warnings.warn(message, stacklevel=stacklevel)


def check_extras(z_loss: float, softcap: float | None, empty: str) -> None:
    """ValueError for an option of trainopt's own that is out of its range."""
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss must be finite and at least 0, not {z_loss!r}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be None, or finite and greater than 0, not {softcap!r}")
    if empty not in ("nan", "zero"):
        raise ValueError(f"empty must be 'nan' or 'zero', not {empty!r}")


def check_linear(
    input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, class_weight: Tensor | None, memory_budget: int
) -> None:
    """ValueError for operands of linear_cross_entropy that do not fit together."""
    if hasattr(weight, "full_tensor"):
        raise ValueError(
            "weight is a DTensor, of which this process may hold a shard: gather it first, with weight.full_tensor()"
        )
    if weight.numel() == 0:
        raise ValueError(
            f"weight is empty, it has shape {_shape(weight)}: a wrapper that shards the model (FSDP, ZeRO) has not"
            " gathered it here. Call the layer through its module (trainopt.LinearCrossEntropyLoss), or gather weight"
            " first (FSDP.summon_full_params, deepspeed.zero.GatheredParameters, weight.full_tensor())"
        )
    if weight.dim() != 2:
        raise ValueError(
            f"weight must have shape (classes, features), not {_shape(weight)}: if it is a flat shard, gather it first"
            " (FSDP.summon_full_params, weight.full_tensor())"
        )
    classes, features = weight.shape
    if input.dim() == 0 or input.shape[-1] != features:
        raise ValueError(
            f"input has shape {_shape(input)} and weight has shape {_shape(weight)}: their last dimensions, the"
            " features, must be equal; if weight is a shard, gather it first (weight.full_tensor())"
        )
    if bias is not None and tuple(bias.shape) != (classes,):
        raise ValueError(f"bias must have shape ({classes},), as weight has {classes} rows, not {_shape(bias)}")
    if class_weight is not None and tuple(class_weight.shape) != (classes,):
        raise ValueError(
            f"class_weight must have shape ({classes},), as weight has {classes} rows, not {_shape(class_weight)}"
        )
    expected = (*input.shape[:-1], classes) if target.is_floating_point() else tuple(input.shape[:-1])
    if tuple(target.shape) != expected:
        kind = "probabilities" if target.is_floating_point() else "classes"
        raise ValueError(
            f"input has shape {_shape(input)}, so a target of {kind} must have shape {expected}, not {_shape(target)}"
        )
    if memory_budget <= 0:
        raise ValueError(f"memory_budget must be a number of bytes greater than 0, not {memory_budget!r}")


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
