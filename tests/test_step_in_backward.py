"""trainopt.step_in_backward: the results of ordinary steps, with one gradient in memory at a time."""

import copy
import math
from unittest import mock

import pytest
import torch
from judge import TABLE, assert_same_bits, outcome
from ranks import mesh_of_one
from torch import nn

import trainopt
from trainopt import switches
from trainopt.schedules import cosine


def network(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 33), nn.Tanh(), nn.Linear(33, 20), nn.LayerNorm(20), nn.Linear(20, 3))
    model.append(nn.Linear(3, 3, bias=False))
    model[-1].weight = nn.Parameter(torch.randn(3, 3))
    return model.to(dtype)


def loss_of(model, step):
    generator = torch.Generator().manual_seed(step)
    dtype = next(model.parameters()).dtype
    return (model(torch.randn(5, 9, generator=generator).to(dtype)).float() ** 2).mean()


def run(make, in_backward, steps=4, dtype=torch.float32, schedule=None):
    """The outcome of steps of one kind or the other; the training loop is the same."""
    model = network(dtype)
    optimizer = make(model)
    scheduler = schedule and schedule(optimizer)
    handle = trainopt.step_in_backward(model, optimizer) if in_backward else None
    for step in range(steps):
        loss_of(model, step).backward()
        assert not in_backward or all(p.grad is None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        if scheduler:
            scheduler.step()
    if handle:
        handle.remove()
    assert optimizer.completed_steps == steps
    return outcome(optimizer, list(model.parameters()))


@pytest.mark.parametrize("path", ["engine", "torch's path"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.in_common is None])
def test_the_results_of_ordinary_steps(name, dtype, path, monkeypatch):
    monkeypatch.setattr(switches, "REFERENCE_FORCED", path != "engine")
    row = TABLE[name]
    for options in ({}, row.usual, {**row.everything, "noise": 0.01, "ema_decay": 0.9}):

        def make(model, options=options):
            parameters = list(model.parameters())
            return row.make([{"params": parameters[:3]}, {"params": parameters[3:], "lr": 0.5}], **options)

        assert_same_bits(run(make, True, dtype=dtype), run(make, False, dtype=dtype))


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: trainopt.Schedule(optimizer, lr=cosine(until=5)),
        lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
    ],
    ids=["trainopt's", "torch's"],
)
def test_schedules(schedule):
    def make(model):
        return trainopt.AdamW(model.parameters(), lr=0.1)

    assert_same_bits(run(make, True, schedule=schedule), run(make, False, schedule=schedule))


def test_one_gradient_at_a_time_and_the_rest_by_step():
    model, other = network(), nn.Parameter(torch.ones(20))
    optimizer = trainopt.SGD([*model.parameters(), other], lr=0.1)
    held = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda _: held.append(sum(p.grad is not None for p in model.parameters())))
    with trainopt.step_in_backward(model, optimizer):
        (loss_of(model, 0) + other.sum()).backward()
        assert max(held) == 1 and other.grad is not None
        optimizer.step()
        assert torch.equal(other.detach(), torch.full((20,), 0.9))
    optimizer.zero_grad()
    before = copy.deepcopy(model.state_dict())
    loss_of(model, 1).backward()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is not None for p in model.parameters())


def test_states_are_saved_loaded_and_carried_on():
    model = network()
    optimizer = trainopt.AdamW(model.parameters(), lr=0.1)
    trainopt.step_in_backward(model, optimizer)
    straight, resumed = [], None
    for step in range(4):
        if step == 2:
            resumed = network()
            resumed.load_state_dict(copy.deepcopy(model.state_dict()))
            second = trainopt.AdamW(resumed.parameters(), lr=0.1)
            trainopt.step_in_backward(resumed, second)
            second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for network_, optimizer_ in ((model, optimizer), *([(resumed, second)] if resumed else [])):
            loss_of(network_, step).backward()
            optimizer_.step()
    straight = outcome(optimizer, list(model.parameters()))
    assert_same_bits(straight, outcome(second, list(resumed.parameters())))


@pytest.mark.parametrize("path", ["engine", "torch's path"])
def test_clipping_by_the_last_norm(path):
    """By hand: the gradients of a pass, divided by what the norm of the pass before calls for."""
    limit = 0.05
    with mock.patch.object(switches, "REFERENCE_FORCED", path != "engine"):
        model, plain = network(torch.float64), network(torch.float64)
        optimizer = trainopt.SGD(model.parameters(), lr=0.3, momentum=0.9)
        trainopt.step_in_backward(model, optimizer, clip_by_last_norm=limit)
        judge = torch.optim.SGD(plain.parameters(), lr=0.3, momentum=0.9)
        last, clipped = None, 0
        for step in range(5):
            loss_of(model, step).backward()
            optimizer.step()
            loss_of(plain, step).backward()
            norm = torch.cat([p.grad.flatten() for p in plain.parameters()]).norm()
            if last is not None:
                factor = min(1.0, limit / (last.item() + 1e-6))
                clipped += factor < 1
                for p in plain.parameters():
                    p.grad.mul_(factor)
            last = norm
            judge.step()
            judge.zero_grad()
        assert clipped
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_a_second_backward_pass_is_refused():
    model = network()
    optimizer = trainopt.SGD(model.parameters(), lr=0.1)
    trainopt.step_in_backward(model, optimizer)
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match=r"parameter \d of group 0 has been stepped.*accumulated"):
        loss_of(model, 1).backward()


@pytest.mark.parametrize("option", ["max_grad_norm", "skip_nonfinite", "zero_grad", "differentiable"])
def test_options_that_do_not_go(option):
    value = {"max_grad_norm": 1.0, "zero_grad": "in_step"}.get(option, True)
    model = network()
    with pytest.raises(ValueError, match=f"{option}={value!r}: "):
        trainopt.step_in_backward(model, trainopt.AdamW(model.parameters(), **{option: value}))
    optimizer = trainopt.AdamW(model.parameters())
    trainopt.step_in_backward(model, optimizer)
    optimizer.param_groups[0][option] = value
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"{option}={value!r}: "):
        loss_of(model, 0).backward()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_no_step_of_averages_that_are_put_back():
    model = network()
    optimizer = trainopt.SGD(model.parameters(), lr=0.1, ema_decay=0.5)
    trainopt.step_in_backward(model, optimizer)
    loss_of(model, 0).backward()
    optimizer.step()
    with optimizer.averaged_parameters(), pytest.raises(RuntimeError, match="moving averages"):
        loss_of(model, 1).backward()
    with optimizer.averaged_parameters(), pytest.raises(RuntimeError, match="moving averages"):
        optimizer.step(lambda: pytest.fail("the closure ran"))


def test_bad_input():
    model = network()
    with pytest.raises(TypeError, match=r"torch.optim.*SGD is not one of trainopt's optimizers.*fuse"):
        trainopt.step_in_backward(model, torch.optim.SGD(model.parameters()))
    optimizer = trainopt.SGD(model.parameters())
    for limit in (0, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"clip_by_last_norm must be a number above 0, got {limit}"):
            trainopt.step_in_backward(model, optimizer, clip_by_last_norm=limit)
    with mesh_of_one() as mesh:
        with pytest.raises(ValueError, match="DistributedDataParallel"):
            trainopt.step_in_backward(nn.parallel.DistributedDataParallel(model), optimizer)
        from torch.distributed.fsdp import fully_shard

        sharded = fully_shard(network(), mesh=mesh)
        with pytest.raises(ValueError, match="DTensors"):
            trainopt.step_in_backward(sharded, trainopt.SGD(sharded.parameters()))
