"""Gradients that are missing, late, shared or oddly laid out; and what a step means to autograd and to memory."""

import gc
import weakref

import numpy as np
import pytest
import torch
from helpers import (
    CLASSES,
    OPTIONS,
    SHAPES,
    Twins,
    assert_same_outcome,
    attempt,
    each_class,
)

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
    assert all(p not in twins.ours.optimizer.state for p in twins.ours.params[:3])
    twins.edit(lambda _, params: params[1].requires_grad_(True))
    twins.step(2)
    twins.edit(lambda _, params: [p.requires_grad_(i == 2) for i, p in enumerate(params)])
    twins.step(2)


@each_class
def test_a_frozen_parameter_with_a_gradient_is_stepped_as_torch_does(name):
    twins = Twins(name)
    for _ in range(3):
        twins.set_gradients()
        twins.edit(lambda _, params: params[2].requires_grad_(False))
        twins.edit(lambda o, _: o.step())
        twins.compare()
        twins.edit(lambda _, params: params[2].requires_grad_(True))


@each_class
def test_tied_parameters(name):
    sides = []
    for cls in CLASSES[name]:
        torch.manual_seed(0)
        embed, head = torch.nn.Embedding(11, 6).double(), torch.nn.Linear(6, 11, bias=False).double()
        head.weight = embed.weight
        params = list(torch.nn.ModuleList([embed, head]).parameters())
        optimizer = cls(params, **OPTIONS[name])
        for i in range(4):
            optimizer.zero_grad()
            head(embed(torch.tensor([i, 3, 5]))).exp().sum().backward()
            optimizer.step()
        sides.append((optimizer, params))
    assert_same_outcome(*sides)


@each_class
@pytest.mark.parametrize("dampening", [0.0, 0.25])
def test_two_parameters_over_the_same_memory(name, dampening):
    """Tied by hand: torch steps one after the other."""
    options = {**OPTIONS[name], **({"dampening": dampening} if name == "SGD" else {})}
    sides = []
    for cls in CLASSES[name]:
        torch.manual_seed(0)
        memory = torch.randn(40, dtype=torch.float64)
        params = [torch.nn.Parameter(memory[:30]), torch.nn.Parameter(memory[10:]), torch.nn.Parameter(memory.clone())]
        optimizer = cls(params, **options)
        for _ in range(4):
            for p in params:
                p.grad = torch.randn(p.shape, dtype=p.dtype)
            optimizer.step()
        sides.append((optimizer, params))
    assert_same_outcome(*sides)


@each_class
def test_one_gradient_for_two_parameters(name):
    twins = Twins(name, shapes=((5, 7), (5, 7)))
    for _ in range(3):
        twins.set_gradients()
        twins.edit(lambda _, params: setattr(params[1], "grad", params[0].grad))
        twins.edit(lambda o, _: o.step())
        twins.compare()


@each_class
def test_the_parameter_as_its_own_gradient(name):
    """p.grad = p.data: what is read is what is written."""
    twins = Twins(name, shapes=((300,), (5, 7)))
    for _ in range(3):
        twins.edit(lambda _, params: [setattr(p, "grad", p.detach()) for p in params])
        twins.edit(lambda o, _: o.step())
        twins.compare()


@each_class
def test_a_gradient_that_overlaps_the_parameter(name):
    sides = []
    for cls in CLASSES[name]:
        memory = torch.linspace(-1, 1, 601, dtype=torch.float64)
        params = [torch.nn.Parameter(memory[:600])]
        optimizer = cls(params, **OPTIONS[name])
        params[0].grad = memory[1:]
        optimizer.step()
        params[0].grad = memory[:1].expand(600)
        optimizer.step()
        sides.append((optimizer, params))
    assert_same_outcome(*sides)


@each_class
def test_the_same_parameter_twice(name):
    sides = []
    for cls in CLASSES[name]:
        torch.manual_seed(0)
        p, q = (torch.nn.Parameter(torch.randn(5, 3, dtype=torch.float64)) for _ in range(2))
        with pytest.warns(UserWarning, match="duplicate parameters"):
            optimizer = cls([p, q, p], **OPTIONS[name])
        for _ in range(3):
            p.grad, q.grad = torch.randn_like(p), torch.randn_like(q)
            optimizer.step()
        sides.append((optimizer, [p, q]))
    assert_same_outcome(*sides)


@each_class
@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradient_accumulation(name, set_to_none):
    sides = []
    for cls in CLASSES[name]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 2)).double()
        optimizer = cls(model.parameters(), **OPTIONS[name])
        for i in range(9):
            (model(torch.full((4, 5), 0.1 * i, dtype=torch.float64)).square().sum() / 3).backward()
            if i % 3 == 2:
                optimizer.step()
                optimizer.zero_grad(set_to_none=set_to_none)
                assert all((p.grad is None) == set_to_none for p in model.parameters())
        sides.append((optimizer, list(model.parameters())))
    assert_same_outcome(*sides)


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


LAYOUTS = {
    "transposed": lambda g: g.t().contiguous().t(),
    "every other": lambda g: torch.stack([g, -g], -1)[..., 0],
    "expanded": lambda g: g[:1].expand_as(g),
    "a scalar expanded": lambda g: g[0, 0].expand_as(g),
    "reversed": lambda g: g.flip(0).contiguous().flip(0),
    "in a larger buffer": lambda g: torch.cat([torch.zeros(1, g.shape[1], dtype=g.dtype), g])[1:],
    "float32": lambda g: g.float(),
    "bfloat16": lambda g: g.bfloat16(),
}


@each_class
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_any_layout(name, layout):
    """What autograd itself makes, too: a sum's gradient is expanded, a transposed product's transposed."""
    twins = Twins(name, shapes=((33, 20), (3, 300)))
    for _ in range(3):
        twins.set_gradients()

        def lay(_, params):
            for p in params:
                gradient = LAYOUTS[layout](p.grad)
                if gradient.dtype == p.dtype:
                    p.grad = gradient
                else:
                    p.grad = None
                    p.grad_dtype = None
                    p.grad = gradient

        twins.edit(lay)
        if layout in ("float32", "bfloat16") and attempt(twins.torchs.optimizer.step) is not None:
            twins.ours.optimizer.step()  # torch's loop refuses; the engine need not
            return
        if layout not in ("float32", "bfloat16"):
            twins.torchs.optimizer.step()
        twins.ours.optimizer.step()
        twins.compare()


# Autograd, memory -----------------------------------------------------------------------------------------------------


@each_class
def test_backward_through_what_was_saved_before_the_step_raises(name):
    for cls in CLASSES[name]:
        p = torch.nn.Parameter(torch.ones(5))
        optimizer = cls([p], **OPTIONS[name])
        loss = (p * p).sum()
        p.grad = torch.ones(5)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@each_class
def test_version_counters_move(name):
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in ((5,), (3, 4), (300_000,))]
    optimizer = CLASSES[name][0](params, **OPTIONS[name])
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    tensors = [t for p in params for t in (p, *optimizer.state[p].values())]
    assert len(tensors) == 3 * (2 if name == "SGD" else 5)
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


@each_class
def test_stepping_does_not_pile_up_objects(name):
    twins = Twins(name)
    twins.set_gradients()
    step = twins.ours.optimizer.step
    step()
    step()
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(50):
        step()
    gc.collect()
    assert len(gc.get_objects()) - before < 10
