"""What the tests of DTensors in two processes are made of.

A file of them fills a dict of cases, all of which two processes run in one go, against the same steps in one process.
"""

import json
import os
import subprocess
import sys
import traceback

import torch
import torch.distributed as dist
from helpers import CLASSES, OPTIONS, assert_equal
from judge import TABLE
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

OPTIMIZERS = {name: row.ours for name, row in TABLE.items()}


def registering(cases):
    """A decorator that makes a function a case of both processes, or a case for each of its arguments."""

    def case(*options):
        def register(function):
            for given in options or [()]:
                arguments = given if isinstance(given, tuple) else (given,)
                name = "-".join([function.__name__, *map(str, arguments)])
                cases[name] = lambda mesh, arguments=arguments: function(mesh, *arguments)
            return function

        return register

    return case


def main(cases, folder):
    """What each process of torchrun runs: all cases, the errors of which it writes down."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    outcomes = {}
    for name, run in cases.items():
        try:
            run(mesh)
            outcomes[name] = None
        except Exception:
            outcomes[name] = traceback.format_exc()
        dist.barrier()
    with open(os.path.join(folder, f"{dist.get_rank()}.json"), "w") as file:
        json.dump(outcomes, file)
    dist.destroy_process_group()
    os._exit(0)  # as in ranks.py


def outcomes_of(script, folder):
    """What each case of a script, which calls `main`, said: by process."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")]),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, script, str(folder)], env=environment, timeout=600, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_number(optimizer, key):
    """Whether a state is one number for a parameter, and no DTensor."""
    ours = optimizer if hasattr(optimizer, "_numbers") else CLASSES[type(optimizer).__name__][0]
    return key in ("step", *ours._numbers)


def check_same(ours, alone, **tolerance):
    """Parameters and states of two optimizers, the one of DTensors put together."""
    for i, (p, q) in enumerate(zip(*(o.param_groups[0]["params"] for o in (ours, alone)), strict=True)):
        assert_equal(whole(p.detach()), q, f"parameter {i}", **tolerance)
        assert set(ours.state[p]) == set(alone.state[q])
        for key, value in alone.state[q].items():
            mine = ours.state[p][key]
            assert isinstance(mine, DTensor) == (isinstance(p, DTensor) and not is_number(ours, key)), key
            if isinstance(mine, DTensor):
                in_whole = tuple(Replicate() for _ in p.placements)
                assert mine.placements == (in_whole if key in TABLE[ours.__class__.__name__].factors else p.placements)
                assert mine.device_mesh == p.device_mesh
            assert_equal(whole(mine), value, f"{key} of parameter {i}", **tolerance)


# Models ---------------------------------------------------------------------------------------------------------------


def network():
    """Sizes that two processes share unevenly, or that leave one without anything."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, 1)).double()


def inputs(step):
    return torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def train(model, optimizer, rows=slice(None), steps=4):
    for step in range(steps):
        optimizer.zero_grad()
        model(inputs(step)[rows]).square().mean().backward()
        optimizer.step()


# By hand --------------------------------------------------------------------------------------------------------------

PLACEMENTS = {"rows": Shard(0), "columns": Shard(1), "replicated": Replicate()}
SHAPES = [(5, 3), (1, 4), (2, 1), (4, 6), (3, 0), (300, 7), (7, 300)]


def spread(mesh, tensor, placement):
    """A copy of it: without one the local tensor of a replicated DTensor is the tensor itself."""
    return distribute_tensor(tensor.clone(), mesh, [placement], src_data_rank=None)


def random(shape, seed):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def steps_of_both(mesh, name, placement, shapes=SHAPES, dtype=torch.float64, is_whole=None, is_missing=None, **options):
    """An optimizer of DTensors and one of the same tensors whole, after each of three steps.

    Args:
        is_whole: of an index, whether that parameter is an ordinary one in both.
        is_missing: of a step and an index, whether there is no gradient.
    """

    def of_both(i, tensor):
        return tensor.clone() if is_whole and is_whole(i) else spread(mesh, tensor, placement), tensor

    start = [of_both(i, random(shape, i).to(dtype)) for i, shape in enumerate(shapes)]
    params = [[nn.Parameter(tensor) for tensor in side] for side in zip(*start, strict=True)]
    optimizers = [OPTIMIZERS[name](given, **{**OPTIONS[name], **options}) for given in params]
    for step in range(3):
        for i, (p, q) in enumerate(zip(*params, strict=True)):
            p.grad = q.grad = None
            if not (is_missing and is_missing(step, i)):
                p.grad, q.grad = of_both(i, random(shapes[i], 100 * step + i).to(dtype))
        for optimizer in optimizers:
            optimizer.step()
        yield optimizers
