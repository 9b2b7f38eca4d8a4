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


def states_of(optimizer, params):
    """The parameters, and whatever each has of states: Muon's matrices have others than the rest."""
    states = {(i, k): [v] for i, p in enumerate(params) for k, v in optimizer.state[p].items()}
    return {"param": [p.detach() for p in params], **states}


def run(make, in_backward, steps=4, dtype=torch.float32, schedule=None, network=network, outcome=outcome):
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


#: The path has no part in what a dtype changes.
each_path = pytest.mark.parametrize(
    "path, dtype",
    [*(("engine", dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16)), ("torch's path", torch.float32)],
    ids=str,
)


@each_path
@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.in_common is None])
def test_the_results_of_ordinary_steps(name, dtype, path, monkeypatch):
    monkeypatch.setattr(switches, "REFERENCE_FORCED", path != "engine")
    row = TABLE[name]
    for options in ({}, row.usual, {**row.everything, "noise": 0.01, "ema_decay": 0.9}):

        def make(model, options=options):
            parameters = list(model.parameters())
            return row.make([{"params": parameters[:3]}, {"params": parameters[3:], "lr": 0.5}], **options)

        assert_same_bits(run(make, True, dtype=dtype), run(make, False, dtype=dtype))


def muon(model, adamw=None, **options):
    return trainopt.Muon(trainopt.muon_groups(model, **options), 0.02, adamw=adamw)


def matrices(model, **options):
    """Muon alone, without AdamW: all else is frozen."""
    for param in model.parameters():
        param.requires_grad_(param.ndim == 2)
    return trainopt.Muon([p for p in model.parameters() if p.ndim == 2], 0.02, **options)


ADAMW = {"lr": 0.1, "noise": 0.01, "l1": 0.01, "cautious": True, "stats": True}
MUONS = {
    "usual": muon,
    "as several matrices": lambda model: muon(model, options={"2.weight": {"split": 4}, "4.*": {"lr": 0.5}}),
    "NorMuon": lambda model: muon(model, options={"*": {"normuon_beta2": 0.9, "nesterov": False}}),
    "everything of AdamW's": lambda model: muon(model, adamw=ADAMW),
    "matrices alone": matrices,
}


@each_path
@pytest.mark.parametrize("name", MUONS)
def test_muons_matrices_of_different_shapes_have_the_results_of_ordinary_steps(name, dtype, path, monkeypatch):
    monkeypatch.setattr(switches, "REFERENCE_FORCED", path != "engine")
    ours, ordinary = (run(MUONS[name], on, dtype=dtype, outcome=states_of) for on in (True, False))
    assert_same_bits(ours, ordinary)
    assert any(key[1] == "momentum_buffer" for key in ours if key != "param")


def test_muons_matrices_of_one_shape_have_them_to_rounding():
    """In ordinary steps they are a stack, whose products may be rounded otherwise; nearer to the judge than single ones
    they are not."""

    def alike(dtype):
        torch.manual_seed(0)
        layers = [layer for _ in range(4) for layer in (nn.Linear(9, 9), nn.Linear(9, 30), nn.Tanh(), nn.Linear(30, 9))]
        return nn.Sequential(*layers).to(dtype)

    for options in ({}, {"normuon_beta2": 0.9}):

        def make(model, options=options):
            return muon(model, options={"*": {"ns_dtype": str(model[0].weight.dtype)[6:], **options}})

        ours, ordinary = (
            [run(make, on, dtype=dtype, network=alike, outcome=states_of)["param"] for on in (True, False)]
            for dtype in (torch.float64, torch.float32)
        )
        truth = ours[1]
        for found, exact in zip(ours[0], truth, strict=True):
            torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-11)
        far = [
            sum(float((p.double() - q).square().sum()) for p, q in zip(side, truth, strict=True)) for side in ordinary
        ]
        assert 0 < far[0] <= 2 * far[1]


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: trainopt.Schedule(optimizer, lr=cosine(until=5)),
        lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
    ],
    ids=["trainopt's", "torch's"],
)
@pytest.mark.parametrize(
    "make", [lambda model: trainopt.AdamW(model.parameters(), lr=0.1), muon], ids=["AdamW", "Muon"]
)
def test_schedules(make, schedule):
    ours, ordinary = (run(make, on, schedule=schedule, outcome=states_of) for on in (True, False))
    assert_same_bits(ours, ordinary)


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


@pytest.mark.parametrize(
    "make", [lambda model: trainopt.AdamW(model.parameters(), lr=0.1), muon], ids=["AdamW", "Muon"]
)
def test_states_are_saved_loaded_and_carried_on(make):
    model = network()
    optimizer = make(model)
    trainopt.step_in_backward(model, optimizer)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # without states yet
    straight, resumed = [], None
    for step in range(4):
        if step == 2:
            resumed = network()
            resumed.load_state_dict(copy.deepcopy(model.state_dict()))
            second = make(resumed)
            trainopt.step_in_backward(resumed, second)
            second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for network_, optimizer_ in ((model, optimizer), *([(resumed, second)] if resumed else [])):
            loss_of(network_, step).backward()
            optimizer_.step()
    straight = states_of(optimizer, list(model.parameters()))
    assert_same_bits(straight, states_of(second, list(resumed.parameters())))
    assert_same_bits(straight, run(make, False, outcome=states_of))


def momentum(cls):
    return lambda model: cls(model.parameters(), lr=0.3, momentum=0.9)


@pytest.mark.parametrize("path", ["engine", "torch's path"])
@pytest.mark.parametrize(
    "makes", [(momentum(trainopt.SGD), momentum(torch.optim.SGD)), (muon, muon)], ids=["SGD", "Muon"]
)
def test_clipping_by_the_last_norm(makes, path):
    """By hand: the gradients of a pass, divided by what the norm of the pass before calls for."""
    limit = 0.05
    with mock.patch.object(switches, "REFERENCE_FORCED", path != "engine"):
        model, plain = network(torch.float64), network(torch.float64)
        optimizer, judge = (make(each) for make, each in zip(makes, (model, plain), strict=True))
        trainopt.step_in_backward(model, optimizer, clip_by_last_norm=limit)
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


@pytest.mark.parametrize(
    "make", [lambda model: trainopt.SGD(model.parameters(), lr=0.1), matrices], ids=["SGD", "Muon"]
)
def test_a_second_backward_pass_is_refused(make):
    model = network()
    optimizer = make(model)
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
    for make in (lambda model: trainopt.AdamW(model.parameters()), matrices):
        model = network()
        optimizer = make(model)
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
