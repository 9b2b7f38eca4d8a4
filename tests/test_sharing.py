"""Memory that a step both reads and writes: torch's plain loop, one parameter after the other, says what is right.

`test_edits.py` goes over all that can be shared; here is what else is to be known of it.
"""

import numpy as np
import pytest
import torch
from helpers import CLASSES, OPTIONS, assert_equal, each_class

import trainopt

SIZE = 40


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


@each_class
@pytest.mark.parametrize("own", [True, False], ids=["its own", "another's"])
@pytest.mark.parametrize("recalled", [False, True])
def test_a_gradient_that_is_a_state_itself(name, own, recalled):
    """The very tensor, of which nobody else holds the memory."""
    params = []
    for cls in CLASSES[name]:
        torch.manual_seed(0)
        mine = [torch.nn.Parameter(torch.randn(SIZE, dtype=torch.float64)) for _ in range(2)]
        optimizer = cls(mine, **OPTIONS[name], foreach=False)
        for _ in range(3 if recalled else 1):
            for p in mine:
                p.grad = torch.randn(SIZE, dtype=torch.float64)
            optimizer.step()
        state = optimizer.state[mine[0 if own else 1]]
        mine[0].grad = next(value for value in state.values() if value.shape == (SIZE,))
        if cls is CLASSES[name][0]:
            assert trainopt.explain(optimizer)[0].path == "torch"
        optimizer.step()
        params.append(mine)
    for p, q in zip(*params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-14, atol=1e-14)
