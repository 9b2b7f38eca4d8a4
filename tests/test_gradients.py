"""Gradients that are missing, late, shared or oddly laid out; and what a step means to autograd and to memory."""

import gc
import weakref

import numpy as np
import pytest
import torch
from helpers import CLASSES, NAMES, OPTIONS, SHAPES, TABLE, Twins, each_class

# Gradients ------------------------------------------------------------------------------------------------------------


@each_class
def test_gradients_that_are_missing_at_some_steps(name):
    twins = Twins(name)
    for missing in ({1}, {0, 2}, set(), {0, 1, 2, 3, 4, 5}, {5}, {3, 4}, set(), {2}):
        twins.step(missing=missing)


@each_class
@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_first_gradients_at_different_times(name, dampening):
    twins = Twins(name, **({"dampening": dampening} if name == "SGD" else {}))
    for missing in ({0, 1, 2, 3}, {1, 2, 3}, {1, 2}, {1}, set(), set()):
        twins.step(missing=missing)
    if name != "SGD":
        counts = [twins.ours.optimizer.state[p]["step"].item() for p in twins.ours.params]
        assert counts == [5, 2, 3, 4, 6, 6]


@each_class
def test_frozen_and_unfrozen(name):
    twins = Twins(name)
    twins.edit(lambda _, params: [p.requires_grad_(False) for p in params[:3]])
    twins.step(2)
    assert TABLE[name].eager_states or all(p not in twins.ours.optimizer.state for p in twins.ours.params[:3])
    twins.edit(lambda _, params: params[1].requires_grad_(True))
    twins.step(2)
    twins.edit(lambda _, params: [p.requires_grad_(i == 2) for i, p in enumerate(params)])
    twins.step(2)


@each_class
@pytest.mark.parametrize("flags", [{}, {"fused": True}, {"foreach": True}], ids=str)
def test_gradients_are_never_written_to(name, flags):
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = CLASSES[name][0](params, **OPTIONS[name], **flags, l1=0.1, noise=0.1)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.param_groups[0]["maximize"] = not optimizer.param_groups[0]["maximize"]
        before = [(p.grad, p.grad.numpy().tobytes(), p.grad._version) for p in params]
        optimizer.step()
        for p, (gradient, content, version) in zip(params, before, strict=True):
            assert p.grad is gradient and gradient.numpy().tobytes() == content and gradient._version == version


# Autograd, memory -----------------------------------------------------------------------------------------------------


@each_class
def test_version_counters_move(name):
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in ((5,), (3, 4), (300_000,))]
    optimizer = CLASSES[name][0](params, **OPTIONS[name])
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    tensors = [t for p in params for t in (p, *optimizer.state[p].values())]
    ours = CLASSES[name][0]
    states = sum(len(optimizer._states_needed(optimizer.param_groups[0], p)) for p in params)
    assert len(tensors) == 3 * (1 + len(ours._numbers) + ours._counts_steps) + states
    before = [t._version for t in tensors]
    optimizer.step()
    assert all(t._version > v for t, v in zip(tensors, before, strict=True))
    params[0].grad = None
    before = [t._version for t in tensors]
    optimizer.step()
    assert [t._version > v for t, v in zip(tensors, before, strict=True)] == [
        t not in {params[0], *optimizer.state[params[0]].values()} for t in tensors
    ]


def owned(values):
    """A tensor over numpy's memory, and a reference that tells when that memory is let go."""
    array = np.array(values, dtype=np.float32)
    return torch.from_numpy(array), weakref.ref(array)


@each_class
def test_nothing_outlives_what_the_user_drops(name):
    value, value_memory = owned(np.ones(1000))
    gradient, gradient_memory = owned(np.ones(1000))
    p, other = torch.nn.Parameter(value), torch.nn.Parameter(torch.ones(5))
    del value
    optimizer = CLASSES[name][0]([p, other], **OPTIONS[name])
    p.grad, other.grad = gradient, torch.ones(5)
    del gradient
    optimizer.step()
    key = "momentum_buffer" if name == "SGD" else "exp_avg"
    state, state_memory = owned(np.ones(1000))
    optimizer.state[p][key] = state
    del state
    for _ in range(2):
        optimizer.step()
    gc.disable()
    try:
        p.grad = None
        assert gradient_memory() is None
        assert state_memory() is not None
        optimizer.state[p][key] = torch.zeros(1000)
        assert state_memory() is None
        watched = weakref.ref(p)
        del optimizer.param_groups[0]["params"][0], optimizer.state[p], p
        assert watched() is None and value_memory() is None
        optimizer.step()
        watched = weakref.ref(optimizer)
        del optimizer
        assert watched() is None
    finally:
        gc.enable()


@each_class
def test_an_optimizer_that_is_dropped_frees_everything(name):
    value, memory = owned(np.ones(10))
    p = torch.nn.Parameter(value)
    del value
    optimizer = CLASSES[name][0]([p], **OPTIONS[name], l1=0.1, noise=0.1)
    p.grad = torch.ones(10)
    optimizer.step()
    optimizer.state_dict()
    gc.disable()
    try:
        del optimizer, p
        assert memory() is None
    finally:
        gc.enable()


def test_stepping_does_not_pile_up_objects():
    """Of no class: all at once, for it is the counting that takes long."""
    twins = [Twins(name) for name in NAMES]
    for each in twins:
        each.set_gradients()
    counts = []
    for steps in (2, 50):
        for each in twins:
            for _ in range(steps):
                each.ours.optimizer.step()
        gc.collect()
        counts.append(len(gc.get_objects()))
    assert counts[1] - counts[0] < 10
