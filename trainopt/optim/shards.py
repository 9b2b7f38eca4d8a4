"""What the step plan asks of a DTensor's spec: how its local tensor lies in the whole."""

from typing import Any

Sizes = tuple[int, ...]


def describe(spec: Any) -> tuple[tuple[Any, ...], bool, Sizes, Sizes | None]:
    """Of a DTensorSpec, on this rank.

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
