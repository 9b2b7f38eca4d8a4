"""The processes of a run: one, or several that torchrun has started.

Each process goes through its share of every micro-batch, so that their number changes the speed and nothing else.
DistributedDataParallel averages the gradients; a model that FSDP2 has sharded is left as it is.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


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
            atexit.register(dist.destroy_process_group)
        return cls(dist.get_rank(), dist.get_world_size(), device)

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model whose backward pass also averages the gradients over the processes."""
        if self.world == 1 or isinstance(model, DistributedDataParallel) or is_sharded(model):
            return model
        return DistributedDataParallel(model)

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


def bare(model: nn.Module) -> nn.Module:
    """The person's own module under DistributedDataParallel."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def is_sharded(model: nn.Module) -> bool:
    """Whether the parameters are DTensors, as FSDP2's `fully_shard` makes them."""
    return any(type(p).__name__ == "DTensor" or type(p.data).__name__ == "DTensor" for p in model.parameters())
