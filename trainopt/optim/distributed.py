"""DTensors: what all ranks that share them must decide alike, and how a rank's part lies in the whole."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Sizes = tuple[int, ...]


def elements(gradient: Tensor) -> Tensor:
    """A gradient's elements as a plain tensor: of a DTensor this rank's, of a sparse one those that it stores."""
    gradient = getattr(gradient, "_local_tensor", gradient).detach()
    if gradient.layout is torch.sparse_coo:
        return gradient.coalesce().values()
    return gradient if gradient.layout is torch.strided else gradient.values()


def on_any_rank(flag: bool | Tensor, params: Iterable[Tensor]) -> bool | Tensor:
    """Whether the flag is set on any rank that these parameters, as far as they are DTensors, are sharded over.

    One collective for each dimension of a mesh, in the order of the parameters, which is the same on all ranks; none
    without DTensors. The result is the flag itself then, else a float32 tensor on the meshes' device.
    """
    groups: dict[Any, tuple[Any, str]] = {}
    for param in params:
        mesh = getattr(param, "device_mesh", None)
        if mesh is not None and mesh.get_coordinate() is not None:
            for dim, placement in enumerate(param.placements):  # type: ignore[attr-defined]
                if not placement.is_replicate():
                    groups[mesh, dim] = (mesh.get_group(dim), mesh.device_type)
    for group, device_type in groups.values():
        flag = flag.float() if isinstance(flag, Tensor) else torch.tensor(float(flag), device=device_type)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group)
    return flag


def describe(spec: Any) -> tuple[tuple[Any, ...], bool, Sizes, Sizes | None]:
    """Tells the step plan of a DTensorSpec how the local tensor lies in the whole, on this rank.

    Returns:
        What is equal for tensors that are distributed alike; whether a sum is pending; the sizes of the whole; where in
        it the local tensor begins, in each dimension, or None if that is not one block of it.
    """
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    placements, sizes = tuple(spec.placements), tuple(spec.shape)
    sharded = [placement.dim for placement in placements if type(placement) is Shard]
    offset = None
    # Two mesh dimensions may cut one dimension of the tensor in either order: then it is not told here.
    if all(type(placement) in (Shard, Replicate) for placement in placements) and len({*sharded}) == len(sharded):
        offset = tuple(compute_local_shape_and_global_offset(sizes, spec.mesh, placements)[1])
    is_pending = any(placement.is_partial() for placement in placements)
    alike = (spec.mesh, placements, getattr(spec, "shard_order", None))
    return alike, is_pending, sizes, offset if offset is None or len(offset) == len(sizes) else None
