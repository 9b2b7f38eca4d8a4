"""Adafactor's rows and columns: shapes of every kind, and where the engine does not take them."""

import copy

import pytest
import torch
from judge import DTYPES, TABLE, assert_same_bits, outcome, random_problem, run

import trainopt

ROW = TABLE["Adafactor"]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))

#: Vectors and matrices; parts of whole matrices, of rows, and of strips of 1,024 columns; stacks of small ones.
SHAPES = {
    "vectors": ((), (1,), (257,)),
    "small matrices": ((1, 1), (1, 9), (9, 1), (7, 5), (33, 257)),
    "many rows": ((70_001, 3), (700, 130)),
    "many columns": ((3, 70_001), (70, 2_050), (1, 1_025)),
    "one part and a little": ((65, 1_024), (64, 1_025)),
    "convolutions": ((20, 9, 3, 3), (6, 4, 1, 1), (40_000, 2, 1)),
    "stacks": ((3, 70, 1_030), (2, 3, 4, 5), (2, 1_000, 90)),
}


def formula_of(start, gradients, options):
    params = [torch.nn.Parameter(p.double().clone()) for p in start]
    optimizer = ROW.make_formula(params, **options)
    for now in gradients:
        for p, g in zip(params, now, strict=True):
            p.grad = g.double()
        optimizer.step()
    return optimizer, params


@pytest.mark.parametrize("options", [{}, {"l1": 0.3, "maximize": True, "weight_decay": 0.2}], ids=["plain", "l1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
def test_every_shape_is_the_formulas(shapes, dtype, options, each_variant):
    start, gradients = random_problem(shapes, dtype, 3, 0)
    tolerance = {"rtol": 2e-5, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-14}
    formula, exact = formula_of(start, gradients, options)
    results = []
    for _ in each_variant():
        for threads in (1, 3):
            torch.set_num_threads(threads)
            optimizer, params = run(ROW.make, start, gradients, **options)
            results.append(outcome(optimizer, params))
    assert all(p.reason == "" for p in trainopt.explain(optimizer))
    for p, q in zip(params, exact, strict=True):
        torch.testing.assert_close(p.detach().double(), q.detach(), **tolerance)
        assert optimizer.state[p].keys() == {"step", *formula.state[q]}
        for name, value in formula.state[q].items():
            torch.testing.assert_close(optimizer.state[p][name].double(), value, **tolerance)
    for other in results[1:]:
        assert_same_bits(results[0], other)


@each_dtype
def test_gradients_and_parameters_that_are_not_one_run(dtype):
    """A row is a row, wherever in memory its elements lie."""
    start, gradients = random_problem(((30, 70), (4, 6, 3, 5)), dtype, 2, 1)
    optimizer, params = run(ROW.make, start, gradients, weight_decay=0.1)
    plain = outcome(optimizer, params)

    def turned(x):
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)

    for move_param, move_gradient in ((turned, turned), (torch.clone, turned), (turned, torch.clone)):
        moved = [torch.nn.Parameter(move_param(p)) for p in start]
        other = ROW.make(moved, weight_decay=0.1)
        for now in gradients:
            for p, g in zip(moved, now, strict=True):
                p.grad = move_gradient(g)
            other.step()
        assert all(p.reason == "" for p in trainopt.explain(other))
        found = {name: [t.contiguous() for t in tensors] for name, tensors in outcome(other, moved).items()}
        assert_same_bits(plain, found)


def test_a_tall_average_is_stored_in_the_parameters_dtype():
    """bfloat16 has 8 bits: what a mean of 10,000 elements is, float32 finds, and only then it is rounded."""
    p = torch.nn.Parameter(torch.ones(10_000, 2, dtype=torch.bfloat16))
    p.grad = torch.full_like(p, 2.0)
    optimizer = trainopt.Adafactor([p])
    optimizer.step()
    state = optimizer.state[p]
    assert state["row_var"].shape == (10_000, 1) and state["col_var"].shape == (1, 2)
    assert state["col_var"].dtype == torch.bfloat16 and (state["col_var"] == 4).all() and (state["row_var"] == 4).all()


def test_an_epsilon_of_none_is_each_parameters_own():
    """torch takes that of a group's first parameter for all that follow in it."""
    dtypes = (torch.float64, torch.bfloat16, torch.float32)
    gradient = 1e-5
    together = [torch.nn.Parameter(torch.ones(4, 4, dtype=dtype)) for dtype in dtypes]
    for p in together:
        p.grad = torch.full_like(p, gradient)
    trainopt.Adafactor(together, lr=0.5).step()
    for p in together:
        alone = torch.nn.Parameter(torch.ones_like(p))
        alone.grad = p.grad.clone()
        torch.optim.Adafactor([alone], lr=0.5, foreach=False).step()
        torch.testing.assert_close(p.detach(), alone.detach())


@pytest.mark.parametrize("edit", ["row_var", "col_var", "variance"])
def test_a_state_of_another_shape_is_refused(edit):
    params = [torch.nn.Parameter(torch.ones(3, 5)), torch.nn.Parameter(torch.ones(4))]
    optimizer = trainopt.Adafactor(params)
    optimizer.init_state()
    saved = copy.deepcopy(optimizer.state_dict())
    state = next(state for state in saved["state"].values() if edit in state)
    state[edit] = torch.ones(2, 5)
    with pytest.raises(ValueError, match=rf"{edit} of .* has shape \(2, 5\), but the parameter has shape"):
        optimizer.load_state_dict(saved)


def test_state_dicts_cross_over():
    shapes = ((9, 4), (5,), (2, 3, 4), ())
    start, gradients = random_problem(shapes, torch.float64, 4, 3)
    ours, ours_params = run(trainopt.Adafactor, start, gradients[:2])
    torchs, torchs_params = run(torch.optim.Adafactor, start, gradients[:2])
    assert list(ours.state_dict()["state"][0]) == list(torchs.state_dict()["state"][0])
    swapped = {
        torch.optim.Adafactor: (ours, ours_params),
        trainopt.Adafactor: (torchs, torchs_params),
    }
    for cls, (optimizer, params) in swapped.items():
        taken = [torch.nn.Parameter(p.detach().clone()) for p in params]
        other = cls(taken)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for now in gradients[2:]:
            for opt, held in ((optimizer, params), (other, taken)):
                for p, g in zip(held, now, strict=True):
                    p.grad = g.clone()
                opt.step()
        for p, q in zip(params, taken, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_a_step_that_repeats_the_last_sees_a_state_that_was_resized():
    p = torch.nn.Parameter(torch.ones(6, 4))
    optimizer = trainopt.Adafactor([p])
    for _ in range(3):
        p.grad = torch.ones_like(p)
        optimizer.step()
    optimizer.state[p]["row_var"].resize_(3, 1)
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError):
        optimizer.step()


@pytest.mark.parametrize("options", [{}, {"l1": 0.3, "weight_decay": 0.2, "cautious_weight_decay": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
def test_a_device_finds_the_cpus_bits(shapes, dtype, options, device):
    if device == "cpu":
        pytest.skip("the CPU's own")
    start, gradients = random_problem(shapes, dtype, 3, 0)
    here = outcome(*run(ROW.make, start, gradients, **options))
    moved = [p.to(device) for p in start], [[g.to(device) for g in now] for now in gradients]
    optimizer, params = run(ROW.make, *moved, **options)
    assert all(p.reason == "" for p in trainopt.explain(optimizer))
    assert_same_bits(here, {name: [t.cpu() for t in tensors] for name, tensors in outcome(optimizer, params).items()})
