"""Groups of gloo: of several processes that run a function, and of this one alone."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(function: Callable[..., None], *args: object, world: int = 2) -> None:
    """`function(rank, *args)` in each of `world` processes; raises with the first one's traceback if it raises."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_run_rank, (function, world, f"file://{folder}/store", args), nprocs=world)


@contextmanager
def mesh_of_one() -> Iterator[dist.device_mesh.DeviceMesh]:
    """A mesh of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.device_mesh.init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def _run_rank(rank, function, world, store, args):
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    function(rank, *args)
    dist.destroy_process_group()
    # Modules that are sharded hold the group in reference cycles, so that gloo's threads may outlive it. If one of them
    # drops a tensor while the interpreter shuts down, Python 3.13 and older ends that thread in a way that C++ answers
    # with std::terminate: once in many runs a process that had passed died with SIGABRT.
    os._exit(0)
