"""The schedule-free optimizers' train and eval modes, in which the parameters are y and x, and files of either."""

import copy
import gc
import math
import warnings
import weakref

import pytest
import torch
from helpers import OPTIONS, assert_same_bits, snapshot, through_a_file
from ranks import mesh_of_one
from schedule_free import assert_same_values, each_class, momentum_of, numbers, step, stepped, values
from torch.distributed.tensor import Shard, distribute_tensor

import trainopt
from trainopt.optim import code8
from trainopt.optim.stats import whole

#: How parameters and states are stored: dtype and options.
STORED = {
    "float32": (torch.float32, {}),
    "float64": (torch.float64, {}),
    "complex64": (torch.complex64, {}),
    "bfloat16": (torch.bfloat16, {}),
    "float16": (torch.float16, {}),
    "bfloat16, states float32": (torch.bfloat16, {"state_dtype": "float32"}),
    "8bit": (torch.float32, {"state_dtype": "8bit"}),
    "master": (torch.bfloat16, {"precision": "master"}),
    "float16 master": (torch.float16, {"precision": "master"}),
    "master24, 8bit": (torch.bfloat16, {"precision": "master24", "state_dtype": "8bit"}),
    "stochastic": (torch.bfloat16, {"precision": "stochastic"}),
}
each_storage = pytest.mark.parametrize("storage", STORED)


# Modes ----------------------------------------------------------------------------------------------------------------


@each_storage
@each_class
def test_evaluating_leaves_no_trace(name, storage, monkeypatch):
    monkeypatch.setattr(code8, "LEAST_ELEMENTS", 0)
    dtype, options = STORED[storage]
    optimizer, params = stepped(name, dtype, **options)
    before = snapshot(optimizer)
    optimizer.eval()
    evaluated = values(params)
    assert not torch.equal(evaluated[4], before["params"][4]) and not optimizer.param_groups[0]["train_mode"]
    optimizer.eval()
    assert all(map(torch.equal, values(params), evaluated))
    optimizer.train()
    assert_same_bits(before, snapshot(optimizer))
    optimizer.train()
    assert_same_bits(before, snapshot(optimizer))
    assert not optimizer._trained  # the copies are gone


@each_storage
@each_class
def test_eval_gives_x(name, storage):
    dtype, options = STORED[storage]
    optimizer, params = stepped(name, dtype, **options)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    held = [dict(optimizer.state[p]) for p in params]
    y = [p.detach().to(wide, copy=True) for p in params]
    optimizer.eval()
    slack = 4 * torch.finfo(dtype).eps
    for p, q, own in zip(params, y, held, strict=True):
        z, beta = own["z"].to(wide), momentum_of(optimizer)
        torch.testing.assert_close(p.detach().to(wide), (q - (1 - beta) * z) / beta, rtol=slack, atol=4 * slack)


@each_storage
def test_what_is_written_in_eval_mode_counts(storage):
    dtype, options = STORED[storage]
    optimizer, params = stepped("AdamWScheduleFree", dtype, **options)
    y = values(params)
    optimizer.eval()
    with torch.no_grad():
        params[4][::2] = 0.5
    optimizer.train()
    assert torch.equal(params[4][1::2], y[4][1::2])
    beta, z = momentum_of(optimizer), optimizer.state[params[4]]["z"][::2]
    expected = (1 - beta) * z + beta * 0.5
    torch.testing.assert_close(params[4].detach()[::2], expected.to(dtype), rtol=4e-3, atol=4e-3)
    assert all(torch.equal(p, q) for p, q in zip(params[:4], y[:4], strict=True))


def test_what_is_not_finite_comes_back():
    optimizer, (p,) = stepped("SGDScheduleFree", shapes=((4,),))
    with torch.no_grad():
        p[:3] = torch.tensor([math.nan, math.inf, -0.0])
    before = snapshot(optimizer)
    optimizer.eval()
    optimizer.train()
    assert_same_bits(before, snapshot(optimizer))


@each_class
def test_a_step_in_eval_mode_raises_and_changes_nothing(name):
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = getattr(trainopt, name)([p])
    called = []
    for _ in range(2):
        before = snapshot(optimizer)
        with pytest.raises(RuntimeError, match=r"in eval mode.*optimizer\.train\(\)"):
            optimizer.step(lambda: called.append(0))
        assert_same_bits(before, snapshot(optimizer))
        optimizer.train()
        optimizer.step()
        optimizer.eval()
    assert not called


def test_groups_that_are_added_have_the_mode_of_the_others():
    optimizer, params = stepped("AdamWScheduleFree", shapes=((3,), (4,)))
    late = [torch.nn.Parameter(torch.ones(5)) for _ in range(2)]
    optimizer.add_param_group({"params": late[:1], "lr": 0.1})
    step(optimizer, [*params, late[0]])
    assert [group["k"] for group in optimizer.param_groups] == [4, 1]
    optimizer.eval()
    optimizer.add_param_group({"params": late[1:]})
    assert not any(group["train_mode"] for group in optimizer.param_groups)
    optimizer.train()
    step(optimizer, [*params, *late])
    optimizer.eval()


def test_modes_are_not_changed_where_the_parameters_are_averages():
    optimizer, params = stepped("SGDScheduleFree", ema_decay=0.9)
    for act in (optimizer.eval, optimizer.train):
        with optimizer.averaged_parameters():
            held = values(params)
            with pytest.raises(RuntimeError, match=r"inside averaged_parameters"):
                act()
            assert all(map(torch.equal, values(params), held))
    optimizer.eval()
    with pytest.raises(RuntimeError, match="eval mode"):
        optimizer.step()


def test_shards_change_modes_as_the_whole_does():
    outcomes = []
    with mesh_of_one() as mesh:
        for spread in (torch.clone, lambda whole: distribute_tensor(whole, mesh, [Shard(0)])):
            generator = torch.Generator().manual_seed(5)
            shapes = ((33, 20), (7,))
            params = [torch.nn.Parameter(spread(torch.randn(shape, generator=generator))) for shape in shapes]
            optimizer = trainopt.AdamWScheduleFree(params, **OPTIONS["AdamWScheduleFree"])
            optimizer.train()
            for _ in range(3):
                for p in params:
                    p.grad = spread(torch.randn(p.shape, generator=generator))
                optimizer.step()
            seen = []
            for act in (optimizer.eval, optimizer.train):
                act()
                seen += [whole(p.detach()).clone() for p in params]
            outcomes.append(seen)
    assert all(map(torch.equal, *outcomes)) and not torch.equal(outcomes[0][0], outcomes[0][2])


def test_parameters_without_a_state_are_left_alone():
    used, unused = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = trainopt.SGDScheduleFree([used, unused], lr=0.1)
    optimizer.train()
    step(optimizer, [used], 2)
    optimizer.eval()
    assert torch.equal(unused.detach(), torch.ones(3)) and unused not in optimizer.state


# Saving and loading ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "eval"])
@each_storage
@each_class
def test_a_checkpoint_of_either_mode_goes_on(name, storage, mode, monkeypatch):
    monkeypatch.setattr(code8, "LEAST_ELEMENTS", 0)
    dtype, options = STORED[storage]
    optimizer, params = stepped(name, dtype, **options)
    if mode == "eval":
        optimizer.eval()
    saved = through_a_file({"params": values(params), "optimizer": optimizer.state_dict()})
    again = [torch.nn.Parameter(p) for p in saved["params"]]
    resumed = getattr(trainopt, name)(again, **{**OPTIONS[name], **options})
    resumed.load_state_dict(saved["optimizer"])
    assert_same_values(snapshot(optimizer), snapshot(resumed))
    for held in (optimizer, resumed):
        held.train()
        step(held, params if held is optimizer else again, 2)
    if mode == "train":
        assert_same_values(snapshot(optimizer), snapshot(resumed))
        return
    assert numbers(optimizer) == numbers(resumed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    slack = 8 * torch.finfo(dtype).eps  # y of the file is told from x and z
    for p, q in zip(params, again, strict=True):
        torch.testing.assert_close(p.detach().to(wide), q.detach().to(wide), rtol=slack, atol=4 * slack)


def test_what_was_kept_is_not_that_of_a_loaded_state():
    optimizer, params = stepped("AdamWScheduleFree")
    saved, weights = copy.deepcopy(optimizer.state_dict()), values(params)
    step(optimizer, params, 3, seed=9)
    optimizer.eval()
    optimizer.load_state_dict(saved)  # of train mode
    with torch.no_grad():
        for p, value in zip(params, weights, strict=True):
            p.copy_(value)
    optimizer.train()
    assert all(map(torch.equal, values(params), weights))
    optimizer.eval()
    twin = copy.deepcopy(optimizer)
    assert not twin._trained and not twin.param_groups[0]["train_mode"]


# Watching a model -----------------------------------------------------------------------------------------------------


@each_class
def test_a_watched_model_warns_when_it_is_evaluated_in_train_mode(name, tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Dropout())
    optimizer = getattr(trainopt, name)(model.parameters(), lr=0.1)
    handle = optimizer.watch(model)
    optimizer.train()
    with warnings.catch_warnings(action="error"):
        model.eval()(torch.ones(3))  # no step yet: x and y are the same
        model.train()(torch.ones(3)).sum().backward()
        optimizer.step()
        model(torch.ones(3))
        copy.deepcopy(model).eval()(torch.ones(3))
        torch.save(model, tmp_path / "model.pt")
        torch.load(tmp_path / "model.pt", weights_only=False).eval()(torch.ones(3))
        optimizer.eval()
        model.eval()(torch.ones(3))
    optimizer.train()
    for _ in range(2):
        with pytest.warns(UserWarning, match=rf"evaluated while {name} is in train mode: .* Call optimizer\.eval\(\)"):
            model(torch.ones(3))
    with warnings.catch_warnings(action="error"):
        handle.remove()
        model(torch.ones(3))
        handle, kept = optimizer.watch(model), weakref.ref(optimizer)
        del optimizer
        gc.collect()
        assert kept() is None
        model(torch.ones(3))
    with pytest.raises(TypeError, match=r"model is 3: it must be a torch\.nn\.Module"):
        getattr(trainopt, name)(model.parameters()).watch(3)
