"""What all ranks that share DTensors must decide alike."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


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
