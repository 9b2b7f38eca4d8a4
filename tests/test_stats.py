"""What a step tells of its parameters, against the same taken before and after it in float64."""

import contextlib
import math
from unittest import mock

import pytest
import torch
from devices import VARIANTS
from judge import DTYPES, TABLE, assert_same_bits, random_problem

import trainopt
from trainopt import switches
from trainopt._extension import _C
from trainopt.optim import precision

SHAPES = ((), (7,), (0, 3), (33, 20), (257,), (40_000,))
#: Ways of stepping and storing, with the dtypes that they are for.
WAYS = {
    "plain": ({}, DTYPES),
    "every stage": ({"l1": 0.1, "noise": 0.01, "max_grad_norm": 1.0, "ema_decay": 0.9}, DTYPES),
    "cleared": ({"zero_grad": "in_step"}, DTYPES),
    "cautious": ({"cautious": True}, DTYPES),
    "8bit": ({"state_dtype": "8bit"}, (torch.float32, torch.bfloat16)),
    "master": ({"precision": "master"}, (torch.bfloat16, torch.float16)),
    "master24, 8bit": ({"precision": "master24", "state_dtype": "8bit"}, (torch.bfloat16,)),
    "stochastic": ({"precision": "stochastic"}, (torch.bfloat16, torch.float16)),
}
CASES = [pytest.param(o, dtype, id=f"{way}-{dtype}") for way, (o, dtypes) in WAYS.items() for dtype in dtypes]


def value(optimizer, param):
    """A parameter with what is stored beside it, in float64."""
    if "master" in (state := optimizer.state.get(param, {})):
        return precision.value_of(param, state).detach().double()
    return (torch.view_as_real(param) if param.is_complex() else param).detach().double().clone()


def steps_with_truth(optimizer, params, gradients):
    """Makes the steps; yields what each has told, and what is true."""
    for now in gradients:
        before = [value(optimizer, p) for p in params]
        for p, g in zip(params, now, strict=True):
            p.grad = g.to(p.device, p.dtype, copy=True)
        optimizer.step()
        truth = {}
        for i, (p, old, g) in enumerate(zip(params, before, now, strict=True)):
            g = (torch.view_as_real(g) if g.is_complex() else g.to(p.dtype)).double()
            moved = value(optimizer, p) - old
            largest = g.abs().max().item() if g.numel() else 0.0
            truth[i] = (g.norm().item(), old.norm().item(), moved.norm().item(), largest, 0)
        yield optimizer.stats(), truth


def assert_true(found, truth):
    assert list(found) == list(truth)
    for name, numbers in truth.items():
        assert found[name] == pytest.approx(numbers, rel=1e-6, abs=1e-30, nan_ok=True), name


@pytest.mark.parametrize("options, dtype", CASES)
@pytest.mark.parametrize("name", TABLE)
def test_what_a_step_tells_is_true(name, options, dtype, device):
    row = TABLE[name]
    start, gradients = random_problem(SHAPES, dtype, 3)
    params = [torch.nn.Parameter(p.to(device, copy=True)) for p in start]
    optimizer = row.make(params, **row.usual, **options, stats=True)
    for found, truth in steps_with_truth(optimizer, params, gradients):
        assert_true(found, truth)
    silent = [torch.nn.Parameter(p.to(device, copy=True)) for p in start]
    plain = row.make(silent, **row.usual, **options)
    for now in gradients:
        for p, g in zip(silent, now, strict=True):
            p.grad = g.to(device, copy=True)
        plain.step()
    assert_same_bits({"param": params}, {"param": silent})
    assert {each.path for each in trainopt.explain(optimizer)} == {each.path for each in trainopt.explain(plain)}


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str)
def test_torchs_path_tells_the_same(dtype, reference):
    if dtype.is_complex:
        start, gradients = random_problem(SHAPES, torch.float32, 2)
        start = [torch.complex(p, p.flip(0) if p.ndim else p) for p in start]
        gradients = [[torch.complex(g, -2 * g) for g in now] for now in gradients]
    else:
        start, gradients = random_problem(SHAPES, dtype, 2)
    params = [torch.nn.Parameter(p.clone()) for p in start]
    optimizer = trainopt.AdamW(params, stats=True)
    with mock.patch.object(switches, "REFERENCE_FORCED", reference):
        for found, truth in steps_with_truth(optimizer, params, gradients):
            if dtype.is_complex:  # the largest is that of the complex numbers
                truth = {i: (*numbers[:3], found[i].largest_gradient, 0) for i, numbers in truth.items()}
                largest = [g.abs().max().item() if g.numel() else 0.0 for g in (p.grad for p in params)]
                assert [each.largest_gradient for each in found.values()] == pytest.approx(largest)
            assert_true(found, truth)


def test_every_variant_and_number_of_threads_tells_the_same_bits():
    start, gradients = random_problem((*SHAPES, (300_001,)), torch.float32, 2)
    told, threads, variant = [], torch.get_num_threads(), _C.cpu_variant()
    try:
        for one in VARIANTS:
            _C.set_cpu_variant(one)
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                params = [torch.nn.Parameter(p.clone()) for p in start]
                optimizer = trainopt.AdamW(params, stats=True)
                told.append([found for found, _ in steps_with_truth(optimizer, params, gradients)])
    finally:
        _C.set_cpu_variant(variant)
        torch.set_num_threads(threads)
    assert all(each == told[0] for each in told)


def test_what_is_not_finite_is_counted(device):
    params = [torch.nn.Parameter(torch.ones(n, device=device)) for n in (3, 1000)]
    optimizer = trainopt.SGD([("a", params[0]), ("b", params[1])], lr=0.1, stats=True)
    params[0].grad = torch.tensor([1.0, -5.0, math.inf]).to(device)
    params[1].grad = torch.ones(1000).to(device)
    params[1].grad[[3, 700, 999]] = torch.tensor([math.nan, -math.inf, math.nan])
    optimizer.step()
    a, b = optimizer.stats().values()
    assert (a.nonfinite, b.nonfinite) == (1, 3)
    assert a.gradient_norm == a.largest_gradient == math.inf and math.isnan(b.gradient_norm)
    assert math.isnan(b.largest_gradient) and math.isnan(b.update_norm)


@pytest.mark.parametrize("kept", ["skip_nonfinite", "scaler"])
def test_a_step_that_is_left_out_tells_its_gradients(kept, device):
    p = torch.nn.Parameter(torch.full((5,), 2.0, device=device))
    optimizer = trainopt.AdamW([p], stats=True, skip_nonfinite=kept == "skip_nonfinite", zero_grad="in_step")
    if kept == "scaler":
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0).to(device), torch.tensor(1.0).to(device)
    p.grad = torch.tensor([1.0, math.nan, 8.0, math.inf, 0.0]).to(device)
    optimizer.step()
    assert optimizer.last_step_skipped and not p.grad.any()
    (told,) = optimizer.stats().values()
    assert (told.update_norm, told.nonfinite) == (0.0, 2)
    assert told.parameter_norm == pytest.approx(math.sqrt(20)) and math.isnan(told.gradient_norm)
    optimizer.found_inf = torch.tensor(0.0).to(device) if kept == "scaler" else None
    p.grad = torch.full((5,), 4.0, device=device)
    optimizer.step()
    (told,) = optimizer.stats().values()
    scale = 4.0 if kept == "scaler" else 1.0
    assert told.gradient_norm == pytest.approx(math.sqrt(80) / scale) and told.update_norm > 0
    assert told.largest_gradient == 4.0 / scale and told.nonfinite == 0
    assert told.update_ratio == told.update_norm / told.parameter_norm


def test_who_is_told_of():
    p, q, r = (torch.nn.Parameter(torch.ones(4)) for _ in range(3))
    optimizer = trainopt.AdamW([{"params": [p], "stats": True}, {"params": [q, r]}])
    assert optimizer.stats() == {}
    for param in (p, q):
        param.grad = torch.ones(4)
    optimizer.step()
    assert list(optimizer.stats()) == [0]
    optimizer.param_groups[1]["stats"] = True  # from the next step on
    p.grad = None
    optimizer.step()
    assert list(optimizer.stats()) == [1]
    assert "stats" in trainopt.explain(optimizer)[1].note
    for group in optimizer.param_groups:
        group["stats"] = False
    with pytest.raises(RuntimeError, match="no parameter group has stats=True"):
        optimizer.stats()


def test_steps_in_backward_tell_too(device):
    told = []
    for in_backward in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(300, 40), torch.nn.ReLU(), torch.nn.Linear(40, 1)).to(device)
        optimizer = trainopt.AdamW(model.named_parameters(), stats=True)
        handle = trainopt.step_in_backward(model, optimizer) if in_backward else None
        for _ in range(2):
            model(torch.ones(8, 300, device=device)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            told.append((in_backward, optimizer.stats()))
        if handle is not None:
            handle.remove()
    assert [t for b, t in told if b] == [t for b, t in told if not b]
    assert list(told[0][1]) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_conjugated_gradients_and_complex_numbers_at_the_end_of_their_range():
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.complex64))
    optimizer = trainopt.SGD([p], lr=0.1, stats=True, cautious=True)
    (p.conj() * torch.tensor(1 + 2j)).real.sum().backward()
    assert p.grad.is_conj()
    optimizer.step()
    assert optimizer.stats()[0].gradient_norm == pytest.approx(math.sqrt(20))
    p.grad = torch.full((4,), 3e38 + 3e38j, dtype=torch.complex64)
    optimizer.step()
    assert optimizer.stats()[0].nonfinite == 0 and math.isfinite(optimizer.stats()[0].largest_gradient)


def test_loaded_states_have_told_nothing():
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = trainopt.AdamW([p], stats=True, skip_nonfinite=True)
    p.grad = torch.full((4,), math.nan)
    optimizer.step()
    assert optimizer.stats()[0].nonfinite == 4
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.stats() == {}


def test_cautious_steps_of_shared_memory_are_made_one_after_the_other():
    p = torch.nn.Parameter(torch.arange(1.0, 5.0))
    p.grad = p.detach()
    trainopt.SGD([p], lr=0.1, cautious=True).step()
    torch.testing.assert_close(p.detach(), torch.arange(1.0, 5.0) * 0.9)
    memory = torch.arange(1.0, 9.0)
    p, q = torch.nn.Parameter(memory[:6]), torch.nn.Parameter(memory[2:])
    p.grad = q.grad = torch.ones(6)
    trainopt.AdamW([p, q], lr=0.1, weight_decay=0.5, cautious=True).step()
    assert memory[2].item() == pytest.approx(2.5125)


class Copying:
    """A wrapper with the optimizer's class and attributes, copied when it was made, as Fabric's is."""

    def __init__(self, optimizer):
        self.__class__ = type(optimizer)
        self.__dict__.update(optimizer.__dict__)


@pytest.mark.parametrize("who_steps", ["wrapper", "optimizer"])
@pytest.mark.parametrize("steps_before", [0, 1])
def test_a_copy_of_the_attributes_tells_the_same(who_steps, steps_before):
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = trainopt.AdamW([p], stats=True)
    p.grad = torch.ones(4)
    for _ in range(steps_before):
        optimizer.step()
    wrapper = Copying(optimizer)
    p.grad *= 3
    (wrapper if who_steps == "wrapper" else optimizer).step()
    assert wrapper.stats() == optimizer.stats() and optimizer.stats()[0].gradient_norm == 6


def edit_groups(optimizer):
    """The first parameter leaves, and a group without stats comes first."""
    group = optimizer.param_groups[0]
    del group["params"][0], group["param_names"][0]
    optimizer.param_groups.insert(0, {**group, "params": [torch.ones(2)], "param_names": ["new"], "stats": False})


def raise_in_closure(optimizer):
    def closure():
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        optimizer.step(closure)


def raise_for_the_norm(optimizer):
    group = optimizer.param_groups[0]
    group.update(max_grad_norm=1.0, error_if_nonfinite=True)
    group["params"][0].grad[0] = math.nan
    with pytest.raises(RuntimeError, match="non-finite"):
        optimizer.step()


def ask_for_states(optimizer):
    group = optimizer.param_groups[0]
    group["lr"] = 0.0
    group["params"].append(torch.nn.Parameter(torch.ones(2)))
    group["param_names"].append("c")
    for param in group["params"]:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert optimizer.completed_steps == 1


def step_compiled(optimizer):
    optimizer.param_groups[0]["stats"] = False
    torch.compile(optimizer.step, backend="eager")()
    assert optimizer.completed_steps == 2
    optimizer.param_groups[0]["stats"] = True


def step_without_stats(optimizer):
    optimizer.param_groups[0]["stats"] = 0
    optimizer.step()
    optimizer.param_groups[0]["stats"] = 1


#: What happens after a step, and whose stats there are then.
AFTERWARDS = {
    "groups edited": (edit_groups, ["a", "b"]),
    "a closure's error": (raise_in_closure, []),
    "a norm's error": (raise_for_the_norm, []),
    "a step for states": (ask_for_states, []),
    "a compiled step": (step_compiled, []),
    "a step without stats": (step_without_stats, []),
}


@pytest.mark.parametrize("afterwards", AFTERWARDS)
@pytest.mark.parametrize("by", ["engine", "torch", "backward"])
def test_it_is_the_last_call_that_tells(afterwards, by, monkeypatch):
    act, names = AFTERWARDS[afterwards]
    monkeypatch.setattr(switches, "REFERENCE_FORCED", by == "torch" and act is not step_compiled)
    a, b = params = [torch.nn.Parameter(torch.full((n,), float(n))) for n in (3, 5)]
    optimizer = trainopt.AdamW([("a", a), ("b", b)], stats=True)
    model = torch.nn.Module()
    model.params = torch.nn.ParameterList(params)
    with trainopt.step_in_backward(model, optimizer) if by == "backward" else contextlib.nullcontext():
        (a.sum() + b.sum()).backward()
        optimizer.step()
    told = optimizer.stats()
    assert [each.parameter_norm for each in told.values()] == pytest.approx([3 * 3**0.5, 5 * 5**0.5])
    a.grad, b.grad = torch.ones(3), torch.ones(5)
    act(optimizer)
    assert optimizer.stats() == {name: told[name] for name in names}
