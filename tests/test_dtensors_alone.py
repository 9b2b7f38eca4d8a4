"""DTensors in this process alone, on a mesh of one: beside ordinary tensors, edited, and in modes of torch's."""

import pytest
import torch
from dtensors import is_number, random, spread, whole
from helpers import CLASSES, OPTIONS, TABLE, assert_equal, attempt, each_class, mixed, paths
from ranks import mesh_of_one
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import trainopt
from trainopt.optim import distributed


@pytest.fixture(scope="module")
def mesh():
    with mesh_of_one() as mesh:
        yield mesh


def skip_unless_shards_are_taken(name):
    if not TABLE[name].takes_shards:
        pytest.skip(f"torch's {name} refuses shards, and in torch 2.11 replicas too")


def shards(mesh, count):
    return [nn.Parameter(spread(mesh, random((4, 4), i), Shard(0))) for i in range(count)]


# Beside ordinary tensors ----------------------------------------------------------------------------------------------


@each_class
@pytest.mark.parametrize("sharded", [True, False])
def test_among_ordinary_parameters(name, sharded, mesh):
    skip_unless_shards_are_taken(name)
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


# Edits ----------------------------------------------------------------------------------------------------------------


def edit_state(change):
    """Of a parameter's first state that is no number."""

    def edit(optimizer, params):
        state = optimizer.state[params[1]]
        key = next(key for key in state if not is_number(optimizer, key))
        state[key] = change(state[key])

    return edit


def edit_gradient(change):
    return lambda optimizer, params: setattr(params[1], "grad", change(params[1].grad))


def set_local(tensor, local):
    tensor._local_tensor = local


def edit_local(change, of=lambda p: p):
    """Of the tensor that a DTensor holds, which changes as DTensors never do it themselves."""
    return lambda optimizer, params: set_local(of(params[1]), change(of(params[1]).to_local().detach()))


def edit_local_gradient(change):
    return edit_local(change, of=lambda p: p.grad)


def replicated(tensor):
    return tensor.redistribute(placements=[Replicate()])


def other_locals_in_states(optimizer, params):
    for value in optimizer.state[params[1]].values():
        if isinstance(value, DTensor):
            set_local(value, value.to_local() + 1)


def replace_count(optimizer, params):
    state = optimizer.state[params[1]]
    state.update({"step": torch.tensor(40.0)} if "step" in state else {})


def replace_parameter(optimizer, params):
    optimizer.param_groups[0]["params"][1] = nn.Parameter(params[1].detach().clone())


def replace_local_data(optimizer, params):
    params[1]._local_tensor.data = params[1]._local_tensor.data + 1


EDITS = {
    "nothing": lambda optimizer, params: None,
    "a gradient gone": edit_gradient(lambda g: None),
    "a gradient of other placements": edit_gradient(replicated),
    "a gradient that is no DTensor": edit_gradient(DTensor.to_local),
    "a gradient in other memory": edit_gradient(torch.clone),
    "a gradient whose local tensor is another": edit_local_gradient(lambda local: local + 1),
    "a transposed local gradient": edit_local_gradient(lambda local: local.t().contiguous().t()),
    "a local gradient with a lazy negation": edit_local_gradient(torch._neg_view),
    "another parameter's gradient": lambda _, params: setattr(params[1], "grad", params[2].grad),
    "a parameter's local tensor": edit_local(lambda local: local + 1),
    "a parameter's local memory": replace_local_data,
    "a state replaced by a copy": edit_state(torch.clone),
    "a state replaced by another value": edit_state(lambda m: m + 1),
    "a state that is no DTensor": edit_state(DTensor.to_local),
    "a state of other placements": edit_state(replicated),
    "a state whose local tensor is another": other_locals_in_states,
    "all states gone": lambda optimizer, _: optimizer.state.clear(),
    "a step count replaced": replace_count,
    "two parameters over one memory": lambda _, params: set_local(params[1], params[2].to_local().detach()),
    "a gradient in a parameter's memory": lambda _, params: set_local(params[1].grad, params[2].to_local().detach()),
    "a parameter replaced": replace_parameter,
    "no gradient needed any more": lambda _, params: params[1].requires_grad_(False),
    "the order of the parameters": lambda optimizer, _: optimizer.param_groups[0]["params"].reverse(),
}


@pytest.mark.parametrize("name, warm", [*((name, 3) for name in CLASSES), ("SGD", 1), ("AdamW", 1), ("NAdam", 1)])
@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_takes_effect_at_the_next_step(name, edit, warm, mesh):
    skip_unless_shards_are_taken(name)
    sides = []
    for cls, flags in zip(CLASSES[name], ({}, {"foreach": False}), strict=True):
        params = shards(mesh, 3)
        params.append(nn.Parameter(random((3,), 3)))
        optimizer = cls(params, **OPTIONS[name], **flags)
        outcomes = []
        for step in range(warm + 2):
            for i, p in enumerate(params):
                if p.requires_grad:
                    p.grad = random(p.shape, 10 * step + i)
                    p.grad = spread(mesh, p.grad, Shard(0)) if isinstance(p, DTensor) else p.grad
            if step == warm:
                EDITS[edit](optimizer, params)
            outcomes.append(attempt(optimizer.step))
            if outcomes[-1] is not None:
                break
        sides.append((outcomes, params, optimizer))
    (mine, params, ours), (theirs, torchs, other) = sides
    assert mine == theirs
    if mine[-1] is not None:
        return
    for p, q in zip(params, torchs, strict=True):
        assert_equal(whole(p.detach()), whole(q.detach()))
        for key, value in other.state[q].items():
            assert_equal(whole(ours.state[p][key]), whole(value))


@each_class
def test_the_engine_steps_them_from_the_second_step_on_without_asking_again(name, mesh, monkeypatch):
    """What is known of a mesh and its placements is kept for as long as the tensors are there."""
    skip_unless_shards_are_taken(name)
    params = shards(mesh, 3)
    optimizer = CLASSES[name][0](params, **OPTIONS[name])
    asked = []
    describe = distributed.describe
    monkeypatch.setattr(distributed, "describe", lambda spec: asked.append(spec) or describe(spec))
    for step in range(4):
        for p in params:
            first = p.detach().clone()
            p.grad = DTensor(torch.ones_like(p.to_local()), p.grad._spec, requires_grad=False) if step else first
        before = len(asked)
        optimizer.step()
        assert (len(asked) > before) == (step == 0)


@each_class
def test_version_counters_of_both_move(name, mesh):
    skip_unless_shards_are_taken(name)
    params = shards(mesh, 3)
    optimizer = CLASSES[name][0](params, **OPTIONS[name])
    for _ in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        loss = sum((p * p).sum() for p in params)
        before = [(p._version, p._local_tensor._version) for p in params]
        optimizer.step()
        assert [(p._version, p._local_tensor._version) for p in params] == [(a + 1, b + 1) for a, b in before]
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@each_class
def test_a_dtensor_made_in_inference_mode_is_written_to_only_there(name, mesh):
    skip_unless_shards_are_taken(name)
    with torch.inference_mode():
        p = spread(mesh, random((4, 4), 0), Shard(0))
    optimizer = CLASSES[name][0]([p], **OPTIONS[name])
    with torch.inference_mode():
        p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.step()
    assert "inference" in attempt(optimizer.step)[1]


def test_a_local_tensor_whose_memory_is_gone_is_named(mesh):
    params = shards(mesh, 2)
    optimizer = trainopt.AdamW(params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    params[1].to_local().untyped_storage().resize_(0)
    error = attempt(optimizer.step)
    assert error[0] is RuntimeError and "parameter 1" in error[1] and "storage" in error[1]


def test_a_compiled_step_of_dtensors_runs_uncompiled(mesh):
    results = []
    for compiled in (True, False):
        params = shards(mesh, 2)
        optimizer = trainopt.AdamW(params, lr=0.1)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for i in range(3):
            for p in params:
                p.grad = spread(mesh, random((4, 4), i), Shard(0))
            step()
        results.append([whole(p.detach()) for p in params])
    for p, q in zip(*results, strict=True):
        assert torch.equal(p, q)
