"""DTensors: what all ranks that share them must decide alike, how a rank's part lies in the whole, and sums over it."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Sizes = tuple[int, ...]


def is_dtensor(value: Any) -> bool:
    """Whether a value is a tensor that is spread over processes; without importing what makes such."""
    return type(value).__name__ == "DTensor"


def elements(gradient: Tensor) -> Tensor:
    """A gradient's elements as a plain tensor: of a DTensor this rank's, of a sparse one those that it stores."""
    gradient = getattr(gradient, "_local_tensor", gradient).detach()
    if gradient.layout is torch.sparse_coo:
        return gradient.coalesce().values()
    return gradient if gradient.layout is torch.strided else gradient.values()


def summed(gradient: Tensor) -> Tensor:
    """A DTensor that is a sum still to be taken over ranks, as those of SequenceParallel are, with the sum taken: a
    collective. Any other tensor as it is."""
    placements = getattr(gradient, "placements", ())
    if not any(placement.is_partial() for placement in placements):
        return gradient
    from torch.distributed.tensor import Replicate

    return gradient.redistribute(placements=[Replicate() if p.is_partial() else p for p in placements])  # type: ignore[attr-defined]


def together(tensor: Tensor) -> Tensor:
    """A DTensor of which every rank has the whole: a collective."""
    from torch.distributed.tensor import Replicate

    return tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim)  # type: ignore[attr-defined]


def placed_as(other: Tensor, tensor: Tensor) -> Tensor:
    """A DTensor spread as another one is, for an operation in place, which does not see to that; others as they are."""
    return tensor.redistribute(placements=other.placements) if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def by_element(function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """What a function of single elements makes of tensors that lie alike: of DTensors, of each rank's part by itself.

    DTensor's own operators do not know all that is done with bits: in torch 2.13 ``x >> 16`` is 0 for an int32 DTensor.
    """
    made = function(*(getattr(tensor, "_local_tensor", tensor) for tensor in tensors))
    return tuple(spread_like(part, tensors[0], tensors[0].shape) for part in made)


def reals_of(tensor: Tensor) -> Tensor:
    """Complex numbers as pairs of reals: a view, but a copy of what is conjugated. Others as they are."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def like(whole: Tensor, param: Tensor) -> Tensor:
    """What every rank has of the whole, spread as a parameter is that is a DTensor."""
    placements = getattr(param, "placements", None)
    if not placements:
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, getattr(param, "device_mesh", None), placements, src_data_rank=None)


def spread_like(local: Tensor, other: Tensor, sizes: torch.Size) -> Tensor:
    """This rank's part of a tensor of these sizes, which is spread as another one is; itself if that is no DTensor.

    Without a collective: whoever calls it knows that each rank's part is what these placements make it.
    """
    if not is_dtensor(other):
        return local
    from torch.distributed.tensor import DTensor

    mesh, placements = other.device_mesh, other.placements  # type: ignore[attr-defined]
    strides = local.stride() if all(p.is_replicate() for p in placements) else row_major(sizes)
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=sizes, stride=strides)


def row_major(sizes: torch.Size) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    return torch.empty(sizes, device="meta").stride()


def on_any_rank(flag: bool | Tensor, params: Iterable[Tensor]) -> bool | Tensor:
    """Whether the flag is set on any rank that these parameters, or their gradients, are sharded over as DTensors.

    One collective for each dimension of a mesh, in the order of the parameters, which is the same on all ranks; none
    without DTensors. The result is the flag itself then, else a float32 tensor on the meshes' device.
    """
    groups: dict[Any, tuple[Any, str]] = {}
    for tensor in (tensor for param in params for tensor in (param, param.grad)):
        mesh = getattr(tensor, "device_mesh", None)
        if mesh is not None and mesh.get_coordinate() is not None:
            for dim, placement in enumerate(tensor.placements):  # type: ignore[union-attr]
                if not placement.is_replicate():
                    groups[mesh, dim] = (mesh.get_group(dim), mesh.device_type)
    for group, device_type in groups.values():
        flag = flag.float() if isinstance(flag, Tensor) else torch.tensor(float(flag), device=device_type)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group)
    return flag


def replica(param: Tensor, sizes: Sequence[int]) -> Tensor:
    """An uninitialised tensor of these sizes beside a parameter: where that is a DTensor, every rank has all of it."""
    mesh = getattr(param, "device_mesh", None)
    if mesh is None:
        return param.new_empty(sizes)
    from torch.distributed.tensor import DTensor, Replicate

    local = torch.empty(sizes, dtype=param.dtype, device=elements(param).device)
    return DTensor.from_local(local, mesh, [Replicate()] * mesh.ndim, run_check=False)


def add_shards(sums: Tensor, keys: Sequence[tuple[Any, ...] | None], rows: Sequence[int] = ()) -> None:
    """Makes sums over shards those over whole tensors, in place: one collective for each dimension of a mesh.

    Args:
        sums: float64. Either numbers, a row each; or rows of pairs of such, whose sum is meant (csrc/core/sum.h).
            Pairs are added in the order of the ranks, numbers as the backend does.
        keys: of each tensor a tuple that begins with its mesh and its placements; None for one that is no DTensor.
        rows: how many rows of `sums` a tensor has. By default one.
    """
    over_shards(sums, keys, rows, _add_numbers if sums.dim() == 1 else _add_pairs)


def over_shards(
    values: Tensor, keys: Sequence[tuple[Any, ...] | None], rows: Sequence[int], combine: Callable[..., Tensor]
) -> None:
    """Combines the ranks' rows of each tensor, in place, over every dimension of a mesh that it is spread over.

    Args:
        values, keys, rows: as `add_shards` has them.
        combine: of this rank's rows, the number of ranks and their group makes the rows of all.
    """
    runs_of: dict[Any, list[tuple[int, int]]] = {}
    begin = 0
    for key, count in zip(keys, rows or [1] * len(keys), strict=True):
        mesh, placements = key[:2] if key is not None else (None, ())
        if count and mesh is not None and mesh.get_coordinate() is not None:
            for dim, placement in enumerate(placements):
                if is_cut(placement) and mesh.size(dim) > 1:
                    _extend(runs_of.setdefault((mesh, dim), []), begin, begin + count)
        begin += count
    for (mesh, dim), runs in runs_of.items():
        # Runs of rows, and not an index, which would have to be copied to the device.
        parts = [values[first:end] for first, end in runs]
        totals = combine(torch.cat(parts), mesh.size(dim), mesh.get_group(dim))
        for part, total in zip(parts, totals.split([len(part) for part in parts]), strict=True):
            part.copy_(total)


def _extend(runs: list[tuple[int, int]], begin: int, end: int) -> None:
    """Adds a run of numbers to such as come before it, to the last one where it follows that."""
    if runs and runs[-1][1] == begin:
        begin = runs.pop()[0]
    runs.append((begin, end))


def _add_numbers(own: Tensor, size: int, group: Any) -> Tensor:
    dist.all_reduce(own, dist.ReduceOp.SUM, group)
    return own


def _add_pairs(own: Tensor, size: int, group: Any) -> Tensor:
    parts = own.new_empty((size, *own.shape))
    dist.all_gather_into_tensor(parts.flatten(0, 1), own, group)
    high, low = parts[0].unbind(-1)
    for part in parts[1:]:
        high, low = _add(high, low, *part.unbind(-1))
    return torch.stack((high, low), -1)


def _add(a: Tensor, a_low: Tensor, b: Tensor, b_low: Tensor) -> tuple[Tensor, Tensor]:
    """As `add` in csrc/core/sum.h: the same sum for any number of shards."""
    high = a + b
    added = high - a
    low = (a_low + b_low) + ((a - (high - added)) + (b - added))
    both = high + low
    finite = both.isfinite()
    return torch.where(finite, both, high), torch.where(finite, low - (both - high), 0.0)


def is_cut(placement: Any) -> bool:
    """Whether ranks have different parts. Where FSDP2 cuts what tensor parallelism has cut, that is no `Shard`."""
    return not (placement.is_replicate() or placement.is_partial())


def describe(spec: Any) -> tuple[tuple[Any, ...], bool, bool, Sizes, Sizes, Sizes | None]:
    """Tells the step plan of a DTensorSpec how the local tensor lies in the whole, on this rank.

    Returns:
        What is equal for tensors of one mesh and placements, the mesh and the placements first; whether a sum is
        pending; whether this rank is outside of the mesh, and has nothing; the dimensions that are spread over ranks;
        the sizes of the whole; where in it the local tensor begins, in each dimension, or None if that is not one block
        of it.
    """
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    placements, sizes = tuple(spec.placements), tuple(spec.shape)
    cuts = [p.dim % len(sizes) for i, p in enumerate(placements) if is_cut(p) and spec.mesh.size(i) > 1]
    offset = None
    is_elsewhere = spec.mesh.get_coordinate() is None
    # Two mesh dimensions may cut one dimension of the tensor in either order: then it is not told here.
    if all(type(placement) in (Shard, Replicate) for placement in placements) and len({*cuts}) == len(cuts):
        # Whoever is outside of the mesh has no part, and decides as those do that have one.
        found = compute_local_shape_and_global_offset(sizes, spec.mesh, placements)[1]
        offset = (0,) * len(sizes) if is_elsewhere else tuple(found)
    is_pending = any(placement.is_partial() for placement in placements)
    key = (spec.mesh, placements, getattr(spec, "shard_order", None))
    return key, is_pending, is_elsewhere, tuple(cuts), sizes, offset
