"""Memory that a step both reads and writes: torch's plain loop, one parameter after the other, says what is right."""

import numpy as np
import pytest
import torch
from helpers import CLASSES, OPTIONS, assert_equal, each_class

import trainopt

SIZE = 40


def state_of(optimizer, param):
    """A param-shaped state; made if there is none yet."""
    state = optimizer.state[param]
    key = "momentum_buffer" if isinstance(optimizer, torch.optim.SGD) else "exp_avg"
    if key not in state:
        if key == "exp_avg":
            state["step"] = torch.zeros(())
            state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            state["max_exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        state[key] = torch.zeros_like(param, memory_format=torch.preserve_format)
    return state, key


def gradient_is_a_later_parameter(optimizer, params):
    params[0].grad = params[2].detach()


def gradient_is_an_earlier_parameter(optimizer, params):
    params[2].grad = params[0].detach()


def gradients_are_each_others_parameters(optimizer, params):
    params[0].grad, params[1].grad = params[1].detach(), params[0].detach()


def gradient_overlaps_a_parameter(optimizer, params):
    memory = torch.linspace(-1, 1, SIZE + 5, dtype=params[0].dtype)
    params[1].data, params[2].grad = memory[5:], memory[:-5]


def one_gradient_of_two_is_a_parameter(optimizer, params):
    params[0].grad = params[1].grad = params[2].detach()


def gradient_repeats_an_element_of_a_parameter(optimizer, params):
    params[0].grad = params[2].detach()[7:8].expand(SIZE)


def gradient_is_anothers_state(optimizer, params):
    state, key = state_of(optimizer, params[2])
    params[0].grad = state[key]


def gradient_is_an_own_state(optimizer, params):
    state, key = state_of(optimizer, params[1])
    params[1].grad = state[key]


def state_is_anothers_state(optimizer, params):
    (state, key), (other, _) = state_of(optimizer, params[0]), state_of(optimizer, params[2])
    state[key] = other[key]


def state_is_a_parameter(optimizer, params):
    state, key = state_of(optimizer, params[0])
    state[key] = params[1].detach()


def gradient_is_numpys_view_of_a_parameter(optimizer, params):
    """Two storages over one memory."""
    params[0].grad = torch.from_numpy(params[2].detach().numpy())


def a_parameter_is_numpys_view_of_a_gradient(optimizer, params):
    params[2].data = torch.from_numpy(params[0].grad.numpy())


def count_in_a_parameter(optimizer, params):
    if not isinstance(optimizer, torch.optim.SGD):
        state, _ = state_of(optimizer, params[0])
        state["step"] = params[2].detach().fill_(3)[4]


def lr_in_a_parameter(optimizer, params):
    optimizer.param_groups[0]["lr"] = params[1].detach().fill_(0.25)[3]


def lr_in_a_state(optimizer, params):
    state, key = state_of(optimizer, params[1])
    state[key].fill_(0.125)
    optimizer.param_groups[0]["lr"] = state[key][3]


def betas_in_a_parameter(optimizer, params):
    if "betas" in optimizer.param_groups[0]:
        optimizer.param_groups[0]["betas"] = tuple(params[0].detach().fill_(0.5)[3:5])


def lazy_negation_of_a_parameter(optimizer, params):
    """torch steps the parameter whose gradient it is, and the engine would step the other."""
    memory = torch.linspace(-1, 1, 2 * SIZE, dtype=params[0].dtype)
    params[0].data, params[2].grad = memory[:SIZE], torch.view_as_complex(memory.view(SIZE, 2)).conj().imag
    assert params[2].grad.is_neg()


SHARED = [
    gradient_is_a_later_parameter,
    gradient_is_an_earlier_parameter,
    gradients_are_each_others_parameters,
    gradient_overlaps_a_parameter,
    one_gradient_of_two_is_a_parameter,
    gradient_repeats_an_element_of_a_parameter,
    gradient_is_anothers_state,
    gradient_is_an_own_state,
    state_is_anothers_state,
    state_is_a_parameter,
    gradient_is_numpys_view_of_a_parameter,
    a_parameter_is_numpys_view_of_a_gradient,
    count_in_a_parameter,
    lr_in_a_parameter,
    lr_in_a_state,
    betas_in_a_parameter,
    lazy_negation_of_a_parameter,
]


def run(cls, options, share, late, steps=4):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(SIZE, dtype=torch.float64)) for _ in range(3)]
    optimizer = cls(params, **options)
    for step in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, dtype=p.dtype)
        if step == late:
            share(optimizer, params)
        optimizer.step()
    return optimizer, params


@each_class
@pytest.mark.parametrize("late", [0, 2], ids=["at first", "later"])
@pytest.mark.parametrize("share", SHARED, ids=lambda share: share.__name__)
def test_shared_memory_is_stepped_in_order(name, share, late):
    options = {**OPTIONS[name], "maximize": False}
    mine, theirs = (
        run(cls, {**options, **flags}, share, late)
        for cls, flags in zip(CLASSES[name], ({}, {"foreach": False}), strict=True)
    )
    for i, (p, q) in enumerate(zip(mine[1], theirs[1], strict=True)):
        assert_equal(p, q, f"parameter {i}")
        for key, value in theirs[0].state[q].items():
            assert_equal(mine[0].state[p][key], value, f"{key} of parameter {i}")


@each_class
def test_large_shared_gradients_give_the_same_bits_in_every_run(name):
    """Several threads at once would read what another has or has not yet written."""
    torch.set_num_threads(2)

    def outcome(cls):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(400_000)) for _ in range(2)]
        optimizer = cls(params, **OPTIONS[name])
        for _ in range(2):
            params[0].grad, params[1].grad = params[1].detach(), torch.ones(400_000)
            optimizer.step()
        return params

    runs = [outcome(CLASSES[name][0]) for _ in range(3)]
    expected = outcome(lambda params, **options: CLASSES[name][1](params, foreach=False, **options))
    for params in runs:
        for p, first, q in zip(params, runs[0], expected, strict=True):
            assert torch.equal(p, first)
            assert_equal(p, q)


def one_gradient_for_both(params):
    params[0].grad = params[1].grad = torch.ones(SIZE)


def gradients_in_one_memory(params):
    params[0].grad, params[1].grad = torch.ones(2, SIZE)


def a_gradient_beside_its_parameter(params):
    memory = torch.ones(4, SIZE)
    for i, p in enumerate(params):
        p.data, p.grad = memory[2 * i], memory[2 * i + 1]


def a_gradient_beside_its_parameter_in_numpys_memory(params):
    memory = np.ones((4, SIZE), dtype=np.float32)
    for i, p in enumerate(params):
        p.data, p.grad = torch.from_numpy(memory[2 * i]), torch.from_numpy(memory[2 * i + 1])


NOT_SHARED = [
    one_gradient_for_both,
    gradients_in_one_memory,
    a_gradient_beside_its_parameter,
    a_gradient_beside_its_parameter_in_numpys_memory,
]


@each_class
@pytest.mark.parametrize("put", NOT_SHARED, ids=lambda put: put.__name__)
def test_memory_that_only_lies_together_is_stepped_by_the_engine(name, put):
    params = [torch.nn.Parameter(torch.ones(SIZE)) for _ in range(2)]
    optimizer = CLASSES[name][0](params, **OPTIONS[name])
    for _ in range(3):
        put(params)
        assert {row.path[:5] for row in trainopt.explain(optimizer)} == {"fused"}
        optimizer.step()
        assert {row.path[:5] for row in trainopt.explain(optimizer)} == {"fused"}


@each_class
def test_explain_tells_of_a_shared_gradient(name):
    params = [torch.nn.Parameter(torch.ones(SIZE)) for _ in range(3)]
    optimizer = CLASSES[name][0](params, **OPTIONS[name])
    for p in params:
        p.grad = torch.ones(SIZE)
    params[0].grad = params[2].detach()
    told = trainopt.explain(optimizer)
    assert [row.path == "torch" for row in told] == [True, False, True]
    assert "shares" in told[0].reason
