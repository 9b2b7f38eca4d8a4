"""Whether the gradients of a step are finite, without waiting for a device that can act on it itself."""

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from trainopt._extension import _C
from trainopt.optim.ranks import elements, on_any_rank

_DEVICE_TYPES = frozenset(_C.device_types()) - {"cpu"}


def found_nonfinite(params: list[Tensor], found_inf: Tensor | None = None) -> bool | Tensor:
    """Whether a gradient of these parameters holds NaN or infinity, or `found_inf` says so.

    Ranks that share DTensors decide alike: what one of them finds in its shard, all know.

    Returns:
        A bool; or, where all gradients lie on devices that the kernels run on, a float32 tensor there (0 or 1), which
        nothing has waited for.
    """
    flags = [_flag_of(gradients) for gradients in _by_device(params)]
    if found_inf is not None:
        flags.append(found_inf)
    flag: bool | Tensor = False
    on_devices = [flag for flag in flags if isinstance(flag, Tensor)]
    if len(on_devices) == len(flags) > 0:
        flag = on_devices[0].detach().float()
        for other in on_devices[1:]:
            flag = torch.maximum(flag, other.to(flag.device, torch.float32, non_blocking=True))
    else:
        flag = any(map(bool, flags))
    flag = on_any_rank(flag, params)
    return bool(flag) if isinstance(flag, Tensor) and flag.device.type not in _DEVICE_TYPES else flag


def _by_device(params: list[Tensor]) -> Iterable[list[Tensor]]:
    """The elements of all gradients, as plain tensors."""
    lists = defaultdict(list)
    for param in params:
        if (gradient := param.grad) is not None:
            lists[gradient.device].append(elements(gradient))
    return lists.values()


def _flag_of(gradients: list[Tensor]) -> bool | Tensor:
    """Whether one of these, of one device, is not finite: a tensor where the kernels run on that device."""
    found = _C.norm_of(gradients, math.inf, False)
    if found is not None:
        largest, _ = found
        return largest.isfinite().logical_not() if isinstance(largest, Tensor) else not math.isfinite(largest)
    flag = torch.stack([gradient.isfinite().all() for gradient in gradients]).all().logical_not()
    return flag if flag.device.type in _DEVICE_TYPES else bool(flag)
