"""DTensors in this process alone, on a mesh of one: beside ordinary tensors, edited, and in modes of torch's."""

import pytest
import torch
from helpers import CLASSES, OPTIONS, TABLE, assert_equal, each_class, mixed, paths
from ranks import mesh_of_one
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor


@pytest.fixture(scope="module")
def mesh():
    with mesh_of_one() as mesh:
        yield mesh


@each_class
@pytest.mark.parametrize("sharded", [True, False])
def test_among_ordinary_parameters(name, sharded, mesh):
    if not TABLE[name].takes_shards:
        pytest.skip(f"torch's {name} refuses shards, and in torch 2.11 replicas too")
    placement = [Shard(0) if sharded else Replicate()]

    def one(*_):
        return distribute_tensor(torch.randn(4, 5, dtype=torch.float64), mesh, placement)

    # torch's loop itself cannot mix them with ordinary tensors in one call of foreach; its plain loop can.
    ours, torchs = mixed(name, lambda: nn.Parameter(one()), one, options={**OPTIONS[name], "foreach": False})
    assert paths(ours[0]) == ["fused", "fused", "fused"]
    for key, value in torchs[0].state[torchs[1][1]].items():
        mine = ours[0].state[ours[1][1]][key]
        assert type(mine) is type(value) and getattr(mine, "placements", 0) == getattr(value, "placements", 0)


@each_class
@pytest.mark.parametrize("extras", [{"l1": 0.1}, {"l1": 0.5, "l1_proximal": True}, {"noise": 0.1}], ids=str)
def test_extras_equal_those_of_an_ordinary_parameter(name, extras, mesh):
    torch.manual_seed(0)
    value = torch.randn(4, 5)
    plain = nn.Parameter(value.clone())
    distributed = nn.Parameter(distribute_tensor(value.clone(), mesh, [Replicate()]))
    optimizers = [CLASSES[name][0]([p], **OPTIONS[name], **extras) for p in (plain, distributed)]
    for _ in range(3):
        gradient = torch.randn(4, 5)
        plain.grad = gradient.clone()
        distributed.grad = distribute_tensor(gradient, mesh, [Replicate()])
        for optimizer in optimizers:
            optimizer.step()
    assert_equal(distributed.to_local(), plain, rtol=1e-5, atol=1e-6)
