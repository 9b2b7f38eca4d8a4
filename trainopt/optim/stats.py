"""What a step tells of each parameter (``stats=True``): norms of gradient, parameter and update, what is not finite.

The engine gathers them from memory that the step has in the nearest cache (csrc/cpu/stats_tile.h), or in registers
(csrc/cuda/stats.h). For what torch's code steps, and for steps that the host leaves out, passes of their own do. What
is found on a device stays there until somebody asks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from trainopt.optim import precision
from trainopt.optim.distributed import elements, is_cut, is_dtensor, over_shards, reals_of
from trainopt.optim.options import extra

Numbered = tuple[int, dict[str, Any], Tensor]  # index over all groups, group, parameter
#: The numbers of `ParameterStats`, in its order: on the host, or as a tensor of five float64 on a device.
Numbers = tuple[float, float, float, float, int] | Tensor


class ParameterStats(NamedTuple):
    """Of one parameter in one step.

    Norms are infinite beyond 1e154 or so, where squares are in float64, as those of `torch.linalg.vector_norm` are.
    """

    gradient_norm: float  # 2-norm, without GradScaler's scale, before clipping
    parameter_norm: float  # 2-norm before the step
    update_norm: float  # 2-norm of what the step has changed the parameter by, decay and noise included; 0 if left out
    largest_gradient: float  # absolute value, without the scale; NaN where an element is NaN
    nonfinite: int  # elements of the gradient that are NaN or infinite

    @property
    def update_ratio(self) -> float:
        """`update_norm` by `parameter_norm`; NaN for a parameter of zeros."""
        return self.update_norm / self.parameter_norm if self.parameter_norm else math.nan


def wanted(group: dict[str, Any]) -> bool:
    """Whether a group's parameters are measured."""
    return bool(extra(group, "stats"))


def end_step(optimizer: Any) -> None:
    """Notes whom the step that has just been made tells of: groups can be edited before somebody asks."""
    record, groups = optimizer._record, optimizer.param_groups
    if record.pass_stats and record.pass_stats_of == record.steps - 1:
        params = [param for group in groups for param in group["params"]]
        passed = {i: record.pass_stats[id(param)] for i, param in enumerate(params) if id(param) in record.pass_stats}
        record.stats = passed | record.stats
    record.pass_stats = {}
    left_out = record.skipped is True  # by the host: the plan has made no step
    names: list[str | int] = []
    for group in groups:
        names += group.get("param_names") or range(len(names), len(names) + len(group["params"]))
    record.names, record.plan = names, None if left_out else optimizer._plan
    record.compiled_before = record.compiled()
    record.stats = _of_wholes(optimizer) | record.stats


def by_name(optimizer: Any) -> dict[str | int, ParameterStats]:
    """Those of the last step, by parameter. Waits for a device where they lie on it."""
    if not any(map(wanted, optimizer.param_groups)):
        raise RuntimeError("stats: no parameter group has stats=True")
    record = optimizer._record
    if record.names is None or record.compiled() != record.compiled_before:
        return {}
    found = read({**of_plan(record.plan), **record.stats})
    return {record.names[index]: found[index] for index in sorted(found)}


def _of_wholes(optimizer: Any) -> dict[int, Numbers]:
    """What the engine has found of DTensors' shards in its last step, as that of the whole.

    Two collectives for each dimension of a mesh, for all parameters together; none without DTensors.
    """
    params = [(param, group) for group in optimizer.param_groups for param in group["params"]]
    if not any(is_dtensor(param) and wanted(group) for param, group in params):
        return {}
    found = of_plan(optimizer._record.plan)
    by_device: dict[torch.device, list[int]] = {}
    for index in found:
        if is_dtensor(params[index][0]):
            by_device.setdefault(elements(params[index][0]).device, []).append(index)
    wholes: dict[int, Numbers] = {}
    for device, indices in by_device.items():
        table = torch.stack([torch.as_tensor(found[i], dtype=torch.float64, device=device) for i in indices])
        table[:, :3].square_()
        over_shards(table, [(params[i][0].device_mesh, params[i][0].placements) for i in indices], (), _combine)
        table[:, :3].sqrt_()
        wholes.update(zip(indices, table, strict=True))
    return wholes


def _combine(own: Tensor, size: int, group: Any) -> Tensor:
    """All ranks' rows of squares of norms, a largest number and a count."""
    largest = own[:, 3].clone()
    dist.all_reduce(own, dist.ReduceOp.SUM, group)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    own[:, 3] = largest
    return own


def of_plan(plan: Any) -> dict[int, Numbers]:
    """What the engine has gathered in its last step, by the parameter's index in the optimizer."""
    return {} if plan is None else dict(plan.stats())


def read(found: dict[int, Numbers]) -> dict[int, ParameterStats]:
    """Numbers as the host reads them, with one wait for each device that they lie on."""
    by_device: dict[torch.device, dict[int, Tensor]] = {}
    on_host = {}
    for index, numbers in found.items():
        if isinstance(numbers, Tensor):
            by_device.setdefault(numbers.device, {})[index] = numbers
        else:
            on_host[index] = _stats(*numbers)
    for rows in by_device.values():
        for index, row in zip(rows, torch.stack(list(rows.values())).tolist(), strict=True):
            on_host[index] = _stats(*row)
    return on_host


def _stats(gradient: float, parameter: float, update: float, largest: float, nonfinite: float) -> ParameterStats:
    largest = math.nan if math.isnan(gradient) else largest
    return ParameterStats(gradient, parameter, update, largest, int(nonfinite))


def note_left_out(optimizer: Any, params: Iterable[Numbered], scale: float = 1.0) -> None:
    """Measures the parameters of a step that is left out: the update is 0."""
    with measured(optimizer, params, scale):
        pass


@contextmanager
def measured(optimizer: Any, params: Iterable[Numbered], scale: float = 1.0) -> Iterator[None]:
    """Measures what is done inside to those of these parameters whose groups ask for it and that have a gradient."""
    chosen = [(index, group, param) for index, group, param in params if wanted(group) and param.grad is not None]
    before = [(_value(optimizer, group, param), _of_gradient(param, scale)) for _, group, param in chosen]
    yield
    for (index, group, param), (value, of_gradient) in zip(chosen, before, strict=True):
        norm, largest, nonfinite = of_gradient
        moved = _value(optimizer, group, param).double().sub_(value)
        numbers = (norm, _norm(value), _norm(moved), largest, nonfinite)
        # A rank outside of a DTensor's mesh has none of them, in place of numbers.
        optimizer._record.stats[index] = torch.stack([number.double().sum() for number in numbers])


@torch.no_grad()
def _value(optimizer: Any, group: dict[str, Any], param: Tensor) -> Tensor:
    """A copy of a parameter, as reals, with what it lacks of a float32 if that is stored beside it."""
    if precision.of(group, param) != "native":
        return precision.value_of(param, optimizer.state.get(param, {})).detach().clone()
    return reals_of(param.detach()).clone()


@torch.no_grad()
def _of_gradient(param: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    gradient = param.grad
    assert gradient is not None
    values = gradient.detach()
    if values.is_sparse:
        values = values.coalesce().values()
    wide = torch.complex128 if values.is_complex() else torch.float64  # in which no absolute value overflows
    size = values.to(wide).abs()
    largest = _largest(size.nan_to_num(0.0, math.inf))
    return whole(_norm(values)) / scale, whole(largest) / scale, whole((~size.isfinite()).sum())


def _largest(size: Tensor) -> Tensor:
    """The largest of numbers that are not below 0; torch's `amax` refuses a rank's part that is empty."""
    own = elements(size)
    largest = own.amax() if own.numel() else own.sum()
    if not is_dtensor(size):
        return largest
    from torch.distributed.tensor import DTensor, Partial, Replicate

    parts = [Partial("max") if is_cut(placement) else Replicate() for placement in size.placements]  # type: ignore[attr-defined]
    return DTensor.from_local(largest, size.device_mesh, parts, run_check=False)  # type: ignore[attr-defined]


def _norm(values: Tensor) -> Tensor:
    return whole(torch.linalg.vector_norm(reals_of(values), dtype=torch.float64))


def whole(value: Tensor) -> Tensor:
    """A DTensor's whole tensor; anything else as it is. Collective."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value
