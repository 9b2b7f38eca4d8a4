"""Steps that are left out for gradients that are not finite, without waiting for a device that can decide on it itself.

GradScaler finds that (``fused=True``), or the optimizer does (``skip_nonfinite=True``).
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from trainopt._extension import _C
from trainopt.optim.distributed import elements, on_any_rank, summed
from trainopt.optim.gradients import DEVICE_TYPES, clear_gradients, clips, find_norm
from trainopt.optim.options import extra
from trainopt.optim.states import States, numbered


def step_on_device(
    optimizer: States,
    plan: Any,
    grad_scale: Tensor | None,
    found_inf: Any,
    norm: float | Tensor | None = None,
    gradients_seen: bool = False,
) -> bool:
    """Makes the step, with its gradients' scale and its fate left on their device; False if the host must know first.

    Then nothing has been changed but states that were missing.
    """

    def step(groups: Any = optimizer.param_groups, new_states: Sequence[int] = ()) -> Any:
        return plan.step(groups, optimizer.state, 1.0, new_states, (), grad_scale, found_inf, norm, gradients_seen)

    optimizer._count_unstarted()
    answer = step()
    if answer.status == "look at gradients":
        if optimizer._only_makes_states():
            return True
        if any(map(clips, optimizer.param_groups)):
            norm = find_norm(optimizer, 1.0 if grad_scale is None else grad_scale, may_raise=False)
        if skips_nonfinite(optimizer):
            found_inf = found_nonfinite(optimizer, found_inf, norm)
            if not lie_on_device(found_inf):
                return False
        gradients_seen = True
        answer = step()
    if answer.status == "ask the host" and _move_counts(optimizer):
        answer = step()
    if answer.status == "unfinished":
        if optimizer._only_makes_states():
            return True
        optimizer._check_groups()
        groups = optimizer._snapshot()
        params = list(numbered(groups))
        # Should the device skip this step, the next one is the first.
        lacking = [params[i] for i in answer.missing if i < len(params)]
        startable = [(i, group, param) for i, group, param in lacking if not optimizer._has_partial_state(param, group)]
        new_states = [i for i, group, param in startable if optimizer._start_before_first_step(param, group)]
        answer = step(groups, new_states)
    if answer.status != "done":
        return False
    optimizer._record.count_unread(found_inf)
    if found_inf is not None:
        clear_gradients(optimizer)  # which the step does only where it is made
    return True


def lie_on_device(*numbers: Any) -> bool:
    """Whether all of these that are not None can be read by kernels where they lie."""
    return all(
        number is None
        or (type(number) is Tensor and number.device.type in DEVICE_TYPES and number.dtype is torch.float32)
        for number in numbers
    )


def skips_nonfinite(optimizer: torch.optim.Optimizer) -> bool:
    return any(extra(group, "skip_nonfinite") for group in optimizer.param_groups)


def found_nonfinite(
    optimizer: torch.optim.Optimizer, found_inf: Tensor | None = None, norm: float | Tensor | None = None
) -> bool | Tensor:
    """Whether a gradient in a group that skips such steps holds NaN or infinity, or `found_inf` says so.

    Ranks that share DTensors decide alike: what one of them finds in its shard, all know.

    Args:
        norm: over the gradients of all groups that clip, if there are such: it is finite where they are, in float64,
            which spares another look at them where all these groups skip steps.

    Returns:
        A bool; or, where all gradients lie on devices that the kernels run on, a float32 tensor there (0 or 1), which
        nothing has waited for.
    """
    groups = [group for group in optimizer.param_groups if extra(group, "skip_nonfinite")]
    params = [param for group in groups for param in group["params"]]
    flags = []
    if norm is not None and all(extra(group, "skip_nonfinite") for group in optimizer.param_groups if clips(group)):
        groups = [group for group in groups if not clips(group)]
        flags.append(_is_not_finite(norm))
    flags += map(_flag_of, _by_device([param for group in groups for param in group["params"]]))
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
    return bool(flag) if isinstance(flag, Tensor) and flag.device.type not in DEVICE_TYPES else flag


def _by_device(params: list[Tensor]) -> Iterable[list[Tensor]]:
    """The elements of all gradients, as plain tensors."""
    lists = defaultdict(list)
    for param in params:
        if (gradient := param.grad) is not None:
            lists[gradient.device].append(elements(summed(gradient)))
    return lists.values()


def _flag_of(gradients: list[Tensor]) -> bool | Tensor:
    """Whether one of these, of one device, is not finite: a tensor where the kernels run on that device."""
    found = _C.norm_of(gradients, math.inf, False)
    if found is not None:
        return _is_not_finite(found[0])
    flag = torch.stack([gradient.isfinite().all() for gradient in gradients]).all().logical_not()
    return flag if flag.device.type in DEVICE_TYPES else bool(flag)


def _is_not_finite(number: float | Tensor) -> bool | Tensor:
    return number.isfinite().logical_not() if isinstance(number, Tensor) else not math.isfinite(number)


def _move_counts(optimizer: States) -> bool:
    """Moves counts of steps, and numbers beside them, to the devices that decide on them (`skip_nonfinite`); whether
    there were any.

    Counts loaded from torch's class lie on the host, which would have to wait at every step.
    """
    moved = False
    for _, group, param in optimizer._enumerate():
        if not extra(group, "skip_nonfinite") or param.device.type not in DEVICE_TYPES:
            continue
        state = optimizer.state.get(param, {})
        for name in ("step", *optimizer._numbers):
            if isinstance(number := state.get(name), Tensor) and number.is_cpu:
                dtype = torch.float32 if name == "step" else number.dtype
                state[name] = number.to(param.device, dtype, non_blocking=True)
                moved = True
    return moved
