"""trainopt's own options, by what they promise: l1, l1_proximal, bias_correction, noise, seed; and gradient scaling."""

import copy
import math
from collections import UserDict

import numpy as np
import pytest
import torch
from helpers import assert_same_bits, snapshot
from judge import TABLE, outcome, random_problem, result_of

import trainopt
from trainopt.optim.options import places_of

ROWS = pytest.mark.parametrize("row", TABLE.values(), ids=TABLE.keys())
MOMENTS = pytest.mark.parametrize("row", [TABLE["Adam"], TABLE["AdamW"]], ids=["Adam", "AdamW"])


def one_step(cls, value, gradient, **options):
    p = torch.tensor(value, dtype=torch.float64).requires_grad_()
    p.grad = torch.tensor(gradient, dtype=torch.float64)
    cls([p], **options).step()
    return p.detach()


# L1 -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maximize", [False, True])
def test_l1_pulls_towards_zero(maximize):
    """With or without maximize, and not at all at 0."""
    found = one_step(trainopt.SGD, [2.0, -2.0, 0.0, -0.0], [0.0] * 4, lr=0.5, l1=0.25, maximize=maximize)
    torch.testing.assert_close(found, torch.tensor([1.875, -1.875, 0, 0], dtype=torch.float64), rtol=0, atol=0)


def test_l1_is_part_of_the_gradient():
    """Moments see it, as they see L2."""
    p = torch.tensor([1.0, -1.0]).requires_grad_()
    p.grad = torch.zeros(2)
    optimizer = trainopt.Adam([p], l1=0.5, weight_decay=0.25)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], torch.tensor([0.075, -0.075]))


def test_l1_with_decoupled_decay_looks_at_the_old_parameter():
    found = one_step(trainopt.AdamW, [2.0], [0.0], lr=0.5, l1=1.0, weight_decay=2.0, eps=0.0)
    # Decay to 0, then a step of lr against the sign that it had.
    torch.testing.assert_close(found, torch.tensor([-0.5], dtype=torch.float64))


def test_l1_of_a_quadratic_finds_the_lasso():
    """min (p - c)^2 / 2 + l1 |p| is solved by soft-thresholding c; the proximal form reaches its zeros exactly."""
    c = torch.tensor([3.0, -3.0, 0.4, -0.4, 0.0, 1.0])
    expected = c.sign() * (c.abs() - 0.5).clamp(min=0)
    p = c.clone().requires_grad_()
    optimizer = trainopt.SGD([p], lr=0.1, l1=0.5, l1_proximal=True)
    for _ in range(300):
        p.grad = p.detach() - c
        optimizer.step()
    torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(p.detach() == 0, expected == 0)


# Proximal -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_proximal_makes_exact_zeros(dtype, variant):
    threshold = 0.5 * 0.25  # a power of two: exact in each dtype
    values = [1.0, 0.125, -0.125, 0.124, -0.0625, 0.0, -0.0, 0.126, -3.0] * 5
    p = torch.tensor(values, dtype=dtype).requires_grad_()
    p.grad = torch.zeros_like(p)
    trainopt.SGD([p], lr=0.5, l1=0.25, l1_proximal=True).step()
    start = torch.tensor(values, dtype=dtype).double()
    expected = (start.sign() * (start.abs() - threshold).clamp(min=0)).to(dtype)
    assert torch.equal(p.detach(), expected)
    assert not p.detach()[p.detach() == 0].signbit().any(), "zeros are positive"


@ROWS
def test_proximal_keeps_nonfinite_values(row):
    p = torch.tensor([math.nan, math.inf, -math.inf]).requires_grad_()
    p.grad = torch.zeros(3)
    row.make([p], **row.kept({"lr": 0.1, "weight_decay": 0.0}), l1=1.0, l1_proximal=True).step()
    infinite = p[1:].isnan().all() if row.averages else p[1] == math.inf and p[2] == -math.inf
    assert p[0].isnan() and infinite  # between two infinities there is no mean


@ROWS
def test_proximal_without_l1_changes_nothing(row):
    start, gradients = random_problem((300,), torch.float32, 3, 2)
    plain = result_of(row.make, start, gradients)["param"][0]
    assert torch.equal(plain, result_of(row.make, start, gradients, l1_proximal=True)["param"][0])


# Bias correction ------------------------------------------------------------------------------------------------------


@MOMENTS
def test_first_steps_with_bias_correction_are_exact(row):
    """-expm1(t log beta) keeps what 1 - beta**t loses: the first step is lr * sign(g) to the last bits."""
    for beta2 in (0.999, 0.9999, 0.999999):
        p = torch.tensor([0.0]).requires_grad_()
        p.grad = torch.tensor([0.7])
        row.make([p], lr=1.0, betas=(0.9, beta2), eps=0.0, weight_decay=0.0).step()
        assert abs(p.item() + 1) < 3e-7


# Everything at once, by group and by schedule -------------------------------------------------------------------------


@ROWS
def test_options_take_effect_when_set(row):
    """Each in param_groups, to be set between steps and scheduled."""
    start, gradients = random_problem((64,), torch.float32, 4, 3)
    names = {"l1": 0.5, "l1_proximal": True, "noise": 0.1, "seed": 3}
    if "bias_correction" in row.defaults:
        names["bias_correction"] = False
    p, q = (start[0].clone().requires_grad_() for _ in range(2))
    late, early = row.make([p]), row.make([q], **names)
    assert names.keys() <= row.ours.EXTRAS.keys() and not names.keys() & late.param_groups[0].keys()
    for name, value in names.items():
        late.param_groups[0][name] = value
    for (g,) in gradients:
        p.grad = q.grad = g
        late.step()
        early.step()
    assert torch.equal(p, q)


@ROWS
def test_options_as_tensors_and_integers(row):
    start, gradients = random_problem((64,), torch.float32, 2, 4)
    plain = result_of(row.make, start, gradients, lr=1.0, l1=0.5, noise=1.0)["param"][0]
    for one in (1, torch.tensor(1.0), torch.tensor(1.0, dtype=torch.float64)):
        assert torch.equal(plain, result_of(row.make, start, gradients, lr=one, l1=0.5, noise=1)["param"][0])


@ROWS
def test_a_learning_rate_tensor_is_read_at_every_step(row):
    start, gradients = random_problem((64,), torch.float32, 2, 5)
    results = []
    for lr in (torch.tensor(0.1), 0.1):
        p = start[0].clone().requires_grad_()
        optimizer = row.make([p], **row.kept({"lr": lr, "weight_decay": 0.1}), l1=0.5, l1_proximal=True)
        for (g,), value in zip(gradients, (0.1, 0.5), strict=True):
            if isinstance(lr, torch.Tensor):
                lr.fill_(value)
            else:
                optimizer.param_groups[0]["lr"] = value
            p.grad = g
            optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)


# Bad values -----------------------------------------------------------------------------------------------------------

BAD = {
    "l1": [-1.0, math.nan, None, "text", [1.0], 1j],
    "noise": [-0.1, math.nan, None, "text", [1.0], 1j],
    "seed": [-1, 2**64, 1.5, "1", None, True],
    "max_grad_norm": [0.0, -1.0, math.nan, True, "1", torch.tensor(1.0)],
    "ema_decay": [1.0, 1.5, -0.5, math.nan, True, "0.5"],
    "ema_warmup": [True, "text"],  # without an average
    "error_if_nonfinite": [True, None],  # without a limit
    "zero_grad": ["always", True],
    "precision": ["half", None, 16],
    "state_dtype": ["bf16", 5, torch.int8, {"nothing": "bfloat16"}],
    "cautious_weight_decay": [True, "text"],  # the first where the decay is in the gradient
    **{
        name: [None, "text", [1.0]]
        for name in ("l1_proximal", "bias_correction", "skip_nonfinite", "cautious", "stats")
    },
}


@pytest.mark.parametrize("steps", [0, 2])
@ROWS
def test_bad_values_are_refused_when_they_are_set_too(row, steps):
    """By the next step, in the words of the constructor, before anything has been changed; and then it goes on."""
    start, gradients = random_problem((64, 3), torch.float32, 4, 9)
    params = [p.clone().requires_grad_() for p in start]
    optimizer = row.make(params)
    expected = result_of(row.make, start, gradients)
    step = 0

    def descend(count):
        nonlocal step
        for now in gradients[step : step + count]:
            for p, g in zip(params, now, strict=True):
                p.grad = g.clone()
            optimizer.step()
        step += count

    descend(steps)
    for p, g in zip(params, gradients[steps], strict=True):
        p.grad = g.clone()
    group = optimizer.param_groups[0]
    refused = 0
    for name, value in [(key, value) for key in BAD if key in row.ours.EXTRAS for value in BAD[key]]:
        p = torch.zeros(2, requires_grad=True)
        try:
            row.make([p], **{name: value})
        except (TypeError, ValueError) as constructors:
            error = constructors
        else:
            assert name == "cautious_weight_decay" and value is True, (name, value)
            continue
        assert name in str(error) and (isinstance(value, dict) or repr(value) in str(error)), error
        with pytest.raises(type(error)) as found:
            row.make([p]).add_param_group({"params": [torch.zeros(2, requires_grad=True)], name: value})
        assert str(found.value) == str(error)
        before = snapshot(optimizer)
        for _ in range(2):
            group[name] = value
            with pytest.raises(type(error)) as found:
                optimizer.step()
            assert str(found.value) == str(error)
        del group[name]
        assert_same_bits(before, snapshot(optimizer))
        refused += 1
    assert refused > 40
    descend(4 - steps)
    found = outcome(optimizer, params)
    assert all(all(map(torch.equal, found[name], expected[name])) for name in expected)


@pytest.mark.parametrize(
    "row", [row for row in TABLE.values() if row.ours._torch_class is None], ids=lambda row: row.ours.__name__
)
@pytest.mark.parametrize("path", ["engine", "foreign", "torch"])
def test_an_option_of_a_rule_that_is_no_number(row, path, monkeypatch):
    """Of an optimizer that torch does not have; torch's have torch's errors. In the second group: nothing of the first
    has been changed."""
    monkeypatch.setattr("trainopt.switches.REFERENCE_FORCED", path == "torch")
    params = [torch.ones(3).requires_grad_() for _ in range(2)]
    for p in params:
        p.grad = torch.ones(3)
    optimizer = row.make([{"params": [p]} for p in params])
    optimizer.step()
    if path == "foreign":
        optimizer.state = UserDict(optimizer.state)
    group = optimizer.param_groups[1]
    set_by_steps = {"d", "d_max", "d_numerator", "k"} if row.ours._sums_over_all else {"scheduled_lr"}
    for key, element in (("lr", -1), ("weight_decay", -1), *places_of(row.ours._rule)):
        for bad in ("text", [1.0], *[None] * (key not in row.ours._may_be_none)):
            if key not in group or key in set_by_steps:
                continue
            kept = group[key]
            group[key] = bad if element < 0 else (*kept[:element], bad, *kept[element + 1 :])
            before = snapshot(optimizer)
            # What all groups of Prodigy's have in common must be one thing first.
            words = key if element < 0 else rf"{key}\[{element}\]|betas is"
            with pytest.raises((TypeError, RuntimeError), match=words):
                optimizer.step()
            assert_same_bits(before, snapshot(optimizer))
            group[key] = kept


def test_a_bad_value_is_refused_again_after_another_groups_error():
    params = [torch.zeros(2, requires_grad=True) for _ in range(2)]
    optimizer = trainopt.SGD([{"params": [p]} for p in params], momentum=0.5)
    for p in params:
        p.grad = torch.ones(2)
    optimizer.step()
    first, second = optimizer.param_groups
    first["l1"] = -1.0
    del second["nesterov"]
    for _ in range(2):
        with pytest.raises((KeyError, ValueError), match=r"nesterov|Invalid l1 value: -1\.0"):
            optimizer.step()
    second["nesterov"] = False
    with pytest.raises(ValueError, match=r"Invalid l1 value: -1\.0"):
        optimizer.step()


def test_a_number_of_numpys_at_the_address_of_another():
    p = torch.zeros(2, requires_grad=True)
    p.grad = torch.ones(2)
    optimizer = trainopt.SGD([p])
    for _ in range(50):
        optimizer.param_groups[0]["l1"] = np.float64(0.25)
        optimizer.step()
        optimizer.param_groups[0]["l1"] = np.float64(-1)
        with pytest.raises(ValueError, match="Invalid l1 value: -1"):
            optimizer.step()


def test_a_tensor_that_is_filled_with_a_bad_value():
    p = torch.zeros(2, requires_grad=True)
    p.grad = torch.ones(2)
    optimizer = trainopt.AdamW([p], l1=torch.tensor(0.5))
    optimizer.step()
    optimizer.param_groups[0]["l1"].fill_(-1)
    with pytest.raises(ValueError, match="Invalid l1 value: -1"):
        optimizer.step()


@pytest.mark.parametrize("late", [{"decoupled_weight_decay": False}, {"differentiable": True}], ids=str)
def test_an_option_that_another_does_not_go_with(late):
    p = torch.zeros(2, requires_grad=True)
    p.grad = torch.ones(2)
    optimizer = trainopt.Adam([p], decoupled_weight_decay=True, cautious_weight_decay=True)
    optimizer.step()
    optimizer.param_groups[0].update(late)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="cautious_weight_decay=True"):
        optimizer.step()
    assert_same_bits(before, snapshot(optimizer))


def test_a_parameter_that_is_added_to_a_list_cannot_be_stored_so():
    """No half-made states are left, and without it the others go on."""
    params = [torch.zeros(5000, requires_grad=True), torch.zeros(5000, dtype=torch.float64, requires_grad=True)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = trainopt.AdamW(params[:1], state_dtype="8bit")
    optimizer.param_groups[0]["params"].append(params[1])
    with pytest.raises(ValueError, match=r"one is torch\.float64"):
        optimizer.step()
    assert not optimizer.state
    optimizer.param_groups[0]["params"].pop()
    optimizer.step()
    assert optimizer.state[params[0]]["exp_avg"].dtype is torch.uint8


# Gradient scaling -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@ROWS
def test_gradient_scale(row, dtype, variant):
    """The gradient is divided by the scale, and what remains is left in .grad, as torch's fused optimizers do."""
    start, gradients = random_problem((1, 33, 513, (28, 25)), dtype, 2, 6)
    scale = 64.0
    divided = [[(g.double() / scale).to(dtype) for g in now] for now in gradients]
    plain = result_of(row.make, start, divided, fused=True, **row.settings["all"])
    params = [p.clone().requires_grad_() for p in start]
    optimizer = row.make(params, fused=True, **row.settings["all"])
    for now, expected in zip(gradients, divided, strict=True):
        for i, (p, g) in enumerate(zip(params, now, strict=True)):
            p.grad = g.clone() if i < 3 else g.t().contiguous().t()  # one of them strided
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
        assert not optimizer.last_step_skipped
        for p, g in zip(params, expected, strict=True):
            assert torch.equal(p.grad, g)
    for i, p in enumerate(params):
        assert torch.equal(p.detach(), plain["param"][i])
    found = outcome(optimizer, params)
    for name in plain:
        assert all(map(torch.equal, found[name], plain[name])), name


@ROWS
def test_gradient_scale_of_a_sliced_gradient(row):
    """What lies between the gradient's elements is not touched."""
    start, gradients = random_problem((300,), torch.float32, 1, 8)
    plain = result_of(row.make, start, [[gradients[0][0] / 8]], **row.settings["all"])
    p = start[0].clone().requires_grad_()
    memory = torch.full((600,), 5.0)
    p.grad = memory[::2].copy_(gradients[0][0])
    optimizer = row.make([p], fused=True, **row.settings["all"])
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    optimizer.step()
    assert (memory[1::2] == 5).all() and torch.equal(memory[::2], gradients[0][0] / 8)
    torch.testing.assert_close(p.detach(), plain["param"][0], rtol=1e-5, atol=1e-6)


@ROWS
def test_a_skipped_step_touches_nothing(row):
    start, gradients = random_problem((100,), torch.float32, 3, 7)
    straight = result_of(row.make, start, [gradients[0], gradients[2]], **row.everything, noise=0.1)
    p = start[0].clone().requires_grad_()
    optimizer = row.make([p], fused=True, **row.everything, noise=0.1)
    assert bool(optimizer.state) == row.eager_states
    made = copy.deepcopy(optimizer.state_dict()["state"])
    for i, (g,) in enumerate([gradients[1], *gradients]):
        p.grad = g.clone()
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(float(i in (0, 2)))
        before = p.detach().clone()
        optimizer.step()
        assert optimizer.last_step_skipped == (i in (0, 2))
        if i == 0:
            torch.testing.assert_close(optimizer.state_dict()["state"], made, rtol=0, atol=0)
        if optimizer.last_step_skipped:
            assert torch.equal(p.detach(), before) and torch.equal(p.grad, g)
    assert torch.equal(p.detach(), straight["param"][0])
    for name in straight.keys() - {"param"}:
        assert torch.equal(optimizer.state[p][name], straight[name][0])
