"""State dicts go both ways between trainopt and torch, wherever they are loaded to; steps go on as if uninterrupted."""

import copy
import pickle
from functools import partial

import judge
import pytest
import torch
from steps import TABLE, UNREAD, counts_on_device

each_row = pytest.mark.parametrize("name", TABLE)
each_unread = pytest.mark.parametrize("name", UNREAD)
SHAPES = ((5,), (300,), (33, 20))
PROBLEM = judge.random_problem(SHAPES, torch.float32, 6)


def kinds_of(name):
    kinds = {"default": {}, "foreach": {"foreach": True}}
    if TABLE[name].has_torchs_fused:
        kinds["fused"] = {"fused": True}
    return {**kinds, "capturable": {"capturable": True}} if "capturable" in TABLE[name].defaults else kinds


def fresh(device):
    return [torch.nn.Parameter(t.to(device, copy=True)) for t in PROBLEM[0]]


def step(optimizer, params, steps):
    for now in PROBLEM[1][steps]:
        for p, g in zip(params, now, strict=True):
            p.grad = g.to(p.device)
        optimizer.step()


def torchs_six_steps(name):
    optimizer, params = judge.run(TABLE[name].make_plain_loop, *PROBLEM, **TABLE[name].usual)
    return judge.outcome(optimizer, params)


def assert_close(optimizer, params, truth):
    found = judge.outcome(optimizer, params)
    assert found.keys() == truth.keys()
    for what, tensors in truth.items():
        for a, b in zip(found[what], tensors, strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-5)


def moved_over(make_first, make_second, device, change=lambda state: state):
    """Three steps by one optimizer, then, with its state dict, three by another."""
    first_params = fresh(device)
    first = make_first(first_params)
    step(first, first_params, slice(3))
    params = [torch.nn.Parameter(p.detach().clone()) for p in first_params]
    second = make_second(params)
    second.load_state_dict(change(first.state_dict()))
    step(second, params, slice(3, 6))
    return second, params


@each_row
def test_state_dicts_go_both_ways(device, name):
    row, truth = TABLE[name], torchs_six_steps(name)
    for kind in kinds_of(name).values():
        for makes in ((row.peer, row.ours), (row.ours, row.peer)):
            first, second = (partial(cls, **row.usual, **kind) for cls in makes)
            assert_close(*moved_over(first, second, device), truth)


@each_row
def test_state_keys_and_places_are_torchs(device, name):
    row = TABLE[name]
    for kind in kinds_of(name).values():
        states = []
        for cls in (row.ours, row.peer):
            params = fresh(device)
            optimizer = cls(params, **row.usual, **kind)
            step(optimizer, params, slice(2))
            states.append({k: (v.device, v.dtype, v.shape) for k, v in optimizer.state[params[1]].items()})
        assert states[0] == states[1], kind


@pytest.mark.parametrize("where", ["cpu", "device"])
@each_unread
def test_a_file_loaded_to_either_side(device, name, where, tmp_path, no_synchronisation):
    row, truth = TABLE[name], torchs_six_steps(name)

    def through_a_file(state):
        torch.save(state, tmp_path / "state.pt")
        place = "cpu" if where == "cpu" else device
        return torch.load(tmp_path / "state.pt", map_location=place, weights_only=True)

    for kind in kinds_of(name).values():
        make = partial(row.make, **row.usual, **kind)
        optimizer, params = moved_over(make, make, device, through_a_file)
        assert_close(optimizer, params, truth)
        gradients = [p.grad for p in params]
        with no_synchronisation():
            for p, g in zip(params, gradients, strict=True):
                p.grad = g
            optimizer.step()


@each_unread
def test_from_counts_on_the_host_to_counts_on_the_device_and_back(device, name, no_synchronisation):
    row, truth = TABLE[name], torchs_six_steps(name)
    counting = [{}, counts_on_device(name)]
    for first, second in (counting, counting[::-1]):

        def with_own_options(state, mine=second):
            for group in state["param_groups"]:
                group.update({"fused": None, **row.kept({"capturable": False}), **mine})
            return state

        optimizer, params = moved_over(
            lambda p, kind=first: row.make(p, **row.usual, **kind),
            lambda p, kind=second: row.make(p, **row.usual, **kind),
            device,
            with_own_options,
        )
        assert_close(optimizer, params, truth)
        with no_synchronisation():
            optimizer.step()


@each_row
def test_copies_and_pickles(device, name):
    row, truth = TABLE[name], torchs_six_steps(name)
    for kind in kinds_of(name).values():
        for duplicate in (copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))):
            params = fresh(device)
            optimizer = row.make(params, **row.usual, **kind)
            step(optimizer, params, slice(3))
            for p in params:
                p.grad = None
            optimizer, params = duplicate((optimizer, params))
            step(optimizer, params, slice(3, 6))
            assert_close(optimizer, params, truth)


@pytest.mark.gpu  # torch lets no parameter's data move to a device of a backend like the emulated one
@each_row
def test_a_model_moved_to_the_device_between_steps(device, name):
    """As torch's: module.to() changes the parameters' data, and the states are moved with load_state_dict."""
    row, truth = TABLE[name], torchs_six_steps(name)
    params = fresh("cpu")
    optimizer = row.make(params, **row.usual)
    step(optimizer, params, slice(3))
    for p in params:
        p.data = p.data.to(device)
        p.grad = None
    optimizer.load_state_dict(optimizer.state_dict())
    step(optimizer, params, slice(3, 6))
    assert_close(optimizer, params, truth)
