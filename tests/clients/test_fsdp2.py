"""FSDP2 as torchtitan uses it, over two gloo processes: blocks sharded one by one, clipping, accumulation, and
distributed checkpoints of model and optimizer.
"""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import run_ranks
from sides import OPTIONS, TORCH, TRAINOPT, make
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")

PROCESSES = 2


class Transformer(nn.Module):
    """Sizes that two processes cannot share evenly."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(19, 10)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(10, 13), nn.GELU(), nn.Linear(13, 10)) for _ in range(2))
        self.norm = nn.LayerNorm(10)
        self.head = nn.Linear(10, 19, bias=False)

    def forward(self, tokens):
        x = self.words(tokens)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))


def sharded(**settings):
    model = Transformer()
    for block in model.blocks:
        fully_shard(block, **settings)
    return fully_shard(model, **settings)


def train(side, model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        optimizer.zero_grad()
        for part in range(2):  # accumulation
            generator = torch.Generator().manual_seed(100 * step + 10 * part + dist.get_rank())
            tokens = torch.randint(19, (3, 7), generator=generator)
            model.set_requires_gradient_sync(part == 1)
            logits = model(tokens[:, :-1]).flatten(0, 1).float()
            (side.losses.cross_entropy(logits, tokens[:, 1:].flatten()) / 2).backward()
        norm = side.clip(model.parameters(), 0.5)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        assert 0 < float(norm) < 100
        optimizer.step()


def whole(model):
    return {name: p.full_tensor().detach().clone() for name, p in model.named_parameters()}


def trained(side, name, settings, steps=3):
    model = sharded(**settings)
    optimizer = make(side, name, model.parameters())
    train(side, model, optimizer, steps)
    return model, optimizer


def check_training(name, half):
    policy = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)} if half else {}
    torchs, ours = (whole(trained(side, name, policy)[0]) for side in (TORCH, TRAINOPT))
    start = whole(sharded())
    assert any(not torch.equal(ours[key], start[key]) for key in start)
    for key, value in torchs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-2 if half else 1e-4, atol=1e-3 if half else 1e-6)


def check_checkpoint(name, folder):
    model, optimizer = trained(TRAINOPT, name, {})
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    train(TRAINOPT, model, optimizer, 2, first=3)

    again = sharded()
    fresh = make(TRAINOPT, name, again.parameters())
    model_state, optimizer_state = get_state_dict(again, fresh)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(again, fresh, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    train(TRAINOPT, again, fresh, 2, first=3)
    wanted, found = whole(model), whole(again)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def process(rank, folder):
    torch.set_num_threads(1)
    for name in OPTIONS:
        check_training(name, half=False)
        check_checkpoint(name, f"{folder}/{name}")
    check_training("AdamW", half=True)
    assert F.cross_entropy is TORCH.losses.cross_entropy


def test_fsdp2(tmp_path):
    run_ranks(process, str(tmp_path), world=PROCESSES)
