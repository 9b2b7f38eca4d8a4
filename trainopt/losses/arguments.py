"""What the losses check of their arguments, beyond what torch checks."""

import math

from torch import Tensor
from torch.nn import _reduction

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def number_of(reduction: str) -> int:
    """torch's number for a reduction; its own error for one that it does not know."""
    number = _REDUCTIONS.get(reduction)
    return _reduction.get_enum(reduction) if number is None else number


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
