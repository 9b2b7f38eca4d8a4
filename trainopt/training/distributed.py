"""The processes of a run: one, or several that torchrun has started.

Each process goes through its share of every micro-batch, so that their number changes the speed and nothing else.
DistributedDataParallel averages the gradients; a model that FSDP2 has sharded is left as it is, and what is saved of it
is whole: a checkpoint of four processes is one of two, or of one.
"""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

from trainopt.optim.distributed import is_dtensor


@dataclass(frozen=True)
class Processes:
    """This process among those that train together."""

    rank: int
    world: int
    device: torch.device  # of the model

    @classmethod
    def join(cls, device: torch.device) -> Processes:
        """Those of torch.distributed if it is set up, else those that torchrun announces, else this one alone."""
        if not dist.is_available():
            return cls(0, 1, device)
        if not dist.is_initialized():
            if int(os.environ.get("WORLD_SIZE", "1")) == 1:
                return cls(0, 1, device)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            atexit.register(_leave)
        return cls(dist.get_rank(), dist.get_world_size(), device)

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value, summed over the processes; exact for whole numbers up to 2**53."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def min(self, value: float) -> float:
        """The smallest of all processes' values."""
        return self._reduce([value], dist.ReduceOp.MIN)[0]

    def _reduce(self, values: Sequence[float], operation: Any) -> list[float]:
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, operation)
        return tensor.tolist()

    def average_gradients(self, params: Sequence[Tensor]) -> None:
        """Each gradient becomes the mean over the processes, where one without it counts as zero."""
        for param in params:
            gradient = torch.zeros_like(param) if param.grad is None else param.grad
            dist.all_reduce(gradient)
            param.grad = gradient.div_(self.world)

    def broadcast(self, value: Any) -> Any:
        """The first process's value, in all of them."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, device=self.device)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank, in all of them."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values


def _leave() -> None:
    """Ends the group at the process's end, with its threads.

    Gloo's threads take the GIL to give back a tensor; one that does so while Python ends ends the process with SIGABRT
    (seen under load: "terminate called without an active exception"). They end with the last that knows the group, and
    DistributedDataParallel, which is in a cycle with what it wraps, may be that.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()


def is_sharded(model: nn.Module) -> bool:
    """Whether the parameters are DTensors, as FSDP2's `fully_shard` makes them."""
    return any(is_dtensor(param) or is_dtensor(param.data) for param in model.parameters())


def whole(value: Any) -> Any:
    """A DTensor's whole tensor, on every process that has a part of it; anything else as it is. Collective."""
    return value.full_tensor() if is_dtensor(value) else value


def like(value: Any, own: Any) -> Any:
    """A whole tensor as one that is spread like `own`, where that is spread; else as it is. Collective."""
    own = own.data if isinstance(own, Parameter) else own
    if not is_dtensor(own) or is_dtensor(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)
