"""The curves: what they compute against torch's schedulers, that they compose, and what they refuse."""

import copy
import math
import pickle
import warnings

import pytest
import torch
from torch.optim import lr_scheduler

from trainopt import schedules
from trainopt.schedules import (
    constant,
    cosine,
    cosine_restarts,
    exponential,
    exponential_to,
    inverse_sqrt,
    linear,
    one_cycle,
    one_minus_sqrt,
    piecewise,
    polynomial,
    step_decay,
    warmup,
    warmup_stable_decay,
)

BASE = 0.3

# curve, torch's scheduler of the same form, and how many steps they are compared for: always past the curve's end,
# where torch has a value there.
PAIRS = {
    "constant": (constant(), lambda o: lr_scheduler.LambdaLR(o, lambda step: 1.0), 5),
    "constant half": (constant(0.5), lambda o: lr_scheduler.ConstantLR(o, 0.5, total_iters=100), 9),
    "linear up": (linear(7, 1 / 3, 1), lambda o: lr_scheduler.LinearLR(o, 1 / 3, 1.0, total_iters=7), 12),
    "linear down": (linear(7, 0.9, 0.1), lambda o: lr_scheduler.LinearLR(o, 0.9, 0.1, total_iters=7), 12),
    "warmup": (warmup(7, start=0.2), lambda o: lr_scheduler.LinearLR(o, 0.2, 1.0, total_iters=7), 12),
    "polynomial": (polynomial(9), lambda o: lr_scheduler.PolynomialLR(o, total_iters=9), 14),
    "polynomial 2.5": (polynomial(9, power=2.5), lambda o: lr_scheduler.PolynomialLR(o, total_iters=9, power=2.5), 14),
    "exponential": (exponential(0.9), lambda o: lr_scheduler.ExponentialLR(o, 0.9), 40),
    "exponential_to": (exponential_to(40, 0.01), lambda o: lr_scheduler.ExponentialLR(o, 0.01 ** (1 / 40)), 40),
    "step_decay": (step_decay(3, 0.5), lambda o: lr_scheduler.StepLR(o, 3, gamma=0.5), 20),
    "step_decay by default": (step_decay(4), lambda o: lr_scheduler.StepLR(o, 4), 20),
    "piecewise": (
        piecewise([3, 8], [1, 0.1, 0.01]),
        lambda o: lr_scheduler.MultiStepLR(o, milestones=[3, 8], gamma=0.1),
        20,
    ),
    "cosine": (cosine(11), lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=11), 11),
    "cosine floor": (cosine(10, 0.1), lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=10, eta_min=0.1 * BASE), 10),
    "restarts": (cosine_restarts(5), lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5), 33),
    "restarts x2": (
        cosine_restarts(3, 2, floor=0.25),
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, T_mult=2, eta_min=0.25 * BASE),
        60,
    ),
    "restarts x3": (cosine_restarts(1, 3), lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 1, T_mult=3), 60),
    "warmup, exponential": (
        warmup(4, start=0.5).then(exponential(0.9)),
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, 0.5, 1.0, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)], [4]
        ),
        20,
    ),
    "warmup, cosine": (
        warmup(4, start=0.5).then(cosine(14)),
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, 0.5, 1.0, total_iters=4), lr_scheduler.CosineAnnealingLR(o, 10)], [4]
        ),
        14,
    ),
}


def sgd(lr=BASE, **options):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros((), dtype=torch.float64))], lr=lr, **options)


def curve_of_torch(make, steps, field="lr"):
    """Values of an option under torch's scheduler, before each step and after the last."""
    optimizer = sgd(momentum=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's SequentialLR calls its own deprecated form
        scheduler = make(optimizer)
        values = [float(optimizer.param_groups[0][field])]
        for _ in range(steps):
            optimizer.step()
            scheduler.step()
            values.append(float(optimizer.param_groups[0][field]))
    return values


@pytest.mark.parametrize("curve, make, steps", PAIRS.values(), ids=PAIRS)
def test_a_curve_is_torchs_schedule(curve, make, steps):
    values = curve_of_torch(make, steps)
    assert [BASE * curve(step) for step in range(steps + 1)] == pytest.approx(values, rel=1e-12, abs=1e-15)
    assert len(set(values)) > 1 or isinstance(curve, constant)


@pytest.mark.parametrize("total", [5, 10, 31])
@pytest.mark.parametrize("rise", [0.3, 0.5])
@pytest.mark.parametrize("three_phase", [False, True])
@pytest.mark.parametrize("anneal", ["cosine", "linear"])
def test_one_cycle_is_torchs(total, rise, three_phase, anneal):
    def make(optimizer):
        strategy = "cos" if anneal == "cosine" else "linear"
        return lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=0.7,
            total_steps=total,
            pct_start=rise,
            anneal_strategy=strategy,
            div_factor=10,
            final_div_factor=100,
            three_phase=three_phase,
            base_momentum=0.85,
            max_momentum=0.95,
        )

    shape = {"rise": (rise * total - 1) / (total - 1), "anneal": anneal, "three_phase": three_phase}
    rate = one_cycle(total - 1, start=0.1, end=1e-3, **shape)
    momentum = one_cycle(total - 1, start=1, peak=0.85 / 0.95, end=1, **shape)
    steps = range(total)
    assert [0.7 * rate(k) for k in steps] == pytest.approx(curve_of_torch(make, total - 1), rel=1e-12)
    assert [0.95 * momentum(k) for k in steps] == pytest.approx(curve_of_torch(make, total - 1, "momentum"), rel=1e-12)


def test_one_cycles_defaults_are_torchs():
    curve = one_cycle(99, rise=29 / 99)
    values = curve_of_torch(lambda o: lr_scheduler.OneCycleLR(o, max_lr=BASE, total_steps=100), 99)
    assert [BASE * curve(k) for k in range(100)] == pytest.approx(values, rel=1e-12)


@pytest.mark.parametrize("rise, expected", [(0.0, [1, 0.5, 0]), (1.0, [0.5, 0.75, 1])])
def test_one_cycle_that_only_falls_or_only_rises(rise, expected):
    curve = one_cycle(2, rise=rise, start=0.5, end=0, anneal="linear")
    assert [curve(k) for k in range(3)] == expected


# The formulas that torch has no scheduler for -------------------------------------------------------------------------


def test_the_first_update_of_a_warmup_is_not_lost():
    assert [warmup(4)(k) for k in range(6)] == pytest.approx([1 / 5, 2 / 5, 3 / 5, 4 / 5, 1, 1])


def test_inverse_sqrt_after_a_warmup_is_that_of_the_transformer():
    curve = warmup(400, start=0).then(inverse_sqrt(400))
    for step in (1, 100, 399, 400, 401, 5000, 10**6):
        assert curve(step) == pytest.approx(math.sqrt(400) * min(step**-0.5, step * 400**-1.5), rel=1e-12)


@pytest.mark.parametrize(
    "tail, fallen",
    [("linear", lambda p: p), ("cosine", lambda p: (1 - math.cos(math.pi * p)) / 2), ("1-sqrt", math.sqrt)],
)
def test_warmup_stable_decay(tail, fallen):
    curve = warmup_stable_decay(100, warmup_steps=10, decay_steps=20, tail=tail, floor=0.1)
    for step in range(150):
        if step < 10:
            expected = (step + 1) / 11
        elif step < 80:
            expected = 1.0
        else:
            expected = 1 - 0.9 * fallen(min((step - 80) / 20, 1))
        assert curve(step) == pytest.approx(expected, rel=1e-12), step


def test_polynomial_floor():
    assert [polynomial(4, power=2, floor=0.2)(k) for k in (0, 2, 4, 9)] == pytest.approx([1, 0.4, 0.2, 0.2])


# Ends, chains, values -------------------------------------------------------------------------------------------------

EVERY = [
    constant(0.5),
    constant(0.5, until=7),
    linear(7, 0.2, 0.6),
    polynomial(7, power=3, floor=0.1),
    exponential_to(7, 0.01),
    cosine(7, floor=0.1),
    one_minus_sqrt(7, floor=0.1),
    one_cycle(7),
    one_cycle(7, three_phase=True),
    warmup(7),
    cosine_restarts(2, 3, floor=0.1, cycles=2),
    cosine_restarts(2),
    exponential(0.5),
    exponential(0.5, until=7),
    step_decay(2),
    step_decay(2, until=7),
    inverse_sqrt(3),
    inverse_sqrt(3, until=7),
    piecewise((2, 5), (1, 0.5, 0.1)),
    piecewise((2, 5), (1, 0.5, 0.1), until=7),
    warmup(3).then(constant(until=4)).then(cosine(7)),
    warmup_stable_decay(7, 2, 2),
]


@pytest.mark.parametrize("curve", EVERY, ids=repr)
def test_a_curve_is_a_value(curve):
    assert pickle.loads(pickle.dumps(curve)) == curve == copy.deepcopy(curve)
    assert len({curve, copy.deepcopy(curve)}) == 1
    assert eval(repr(curve), vars(schedules)) == curve
    with pytest.raises(AttributeError):
        curve.until = 3
    forwards = [curve(k) for k in range(30)]
    assert [curve(k) for k in reversed(range(30))] == forwards[::-1]
    assert all(type(value) in (float, int) and 0 <= value <= 1 for value in forwards)


@pytest.mark.parametrize("curve", [curve for curve in EVERY if curve.ends(0) is not None], ids=repr)
def test_a_curve_keeps_its_last_value(curve):
    end = curve.ends(0)
    assert len({curve(step) for step in range(end, 3 * end)}) == 1
    if not isinstance(curve, constant):
        assert len({curve(step) for step in range(end + 1)}) > 1


@pytest.mark.parametrize("curve", EVERY, ids=repr)
def test_a_curve_in_a_chain_begins_where_the_one_before_ends(curve):
    """Lengths count from there. Step numbers do not: the end is where it was, so such a curve is only shorter."""
    chained = warmup(0).then(curve)
    assert [chained(k) for k in range(30)] == [curve(k) for k in range(30)]
    late = constant(0.125, until=1).then(curve)
    assert late(0) == 0.125 and late(1) == curve(0)
    if curve.ends(0) == 7:
        assert late.ends(0) == (8 if isinstance(curve, warmup) else 7)
    if isinstance(curve, schedules.Stretch):
        assert late(30) == curve(30)


def test_lengths_count_from_the_beginning_of_the_curve():
    for curve in (exponential(0.5), step_decay(3), inverse_sqrt(5), warmup(9), cosine_restarts(4, 2)):
        late = constant(until=100).then(curve)
        assert [late(100 + k) for k in range(30)] == [curve(k) for k in range(30)]


def test_chains_of_chains_are_the_same_however_they_are_made():
    a, b, c = warmup(3), exponential(0.9, until=8), cosine(20, floor=0.2)
    left, right = a.then(b).then(c), a.then(b.then(c))
    assert [left(k) for k in range(30)] == [right(k) for k in range(30)]


def test_the_example_of_the_docs():
    curve = warmup(100).then(cosine(until=1000, floor=0.1))
    assert [curve(k) for k in (0, 100, 550, 1000, 10**9)] == pytest.approx([1 / 101, 1, 0.55, 0.1, 0.1])


def test_the_last_update_is_made_at_the_floor():
    updates = 50
    used = [cosine(until=updates - 1, floor=0.1)(completed) for completed in range(updates)]
    assert used[0] == 1 and used[-1] == 0.1 and min(used[:-1]) > 0.1


def test_nothing_is_divided_by_zero():
    for curve in (cosine(0, 0.1), linear(0, 1, 0.1), polynomial(0, floor=0.1), exponential_to(0, 0.1)):
        assert curve(0) == curve(1) == 0.1
        assert warmup(0).then(curve)(0) == 0.1
        assert constant(until=0).then(curve)(5) == 0.1
    assert one_minus_sqrt(0, 0.1)(0) == 0.1 and one_cycle(0)(0) == one_cycle(0).end
    assert warmup(0)(0) == 1 == warmup_stable_decay(0, 0, 0, floor=1)(0)
    assert warmup(5).then(cosine(5, 0.1))(5) == 0.1


def test_large_step_numbers():
    assert cosine(10**15, 0.5)(10**15 - 1) == pytest.approx(0.5)
    assert cosine_restarts(7)(10**15) == pytest.approx(cosine_restarts(7)(10**15 % 7))
    assert exponential(0.5)(10**6) == 0
    assert cosine_restarts(1, 2)(2**60 - 1) == 1


def test_a_step_may_be_any_whole_number():
    assert cosine(10)(torch.tensor(5)) == cosine(10)(5)


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, name, value",
    [
        (lambda: cosine(-1), "cosine: until", "-1"),
        (lambda: cosine(1.5), "cosine: until", "1.5"),
        (lambda: cosine(True), "cosine: until", "True"),
        (lambda: cosine("9"), "cosine: until", "'9'"),
        (lambda: cosine(9, floor=1.5), "cosine: floor", "1.5"),
        (lambda: cosine(9, floor=-0.1), "cosine: floor", "-0.1"),
        (lambda: cosine(9, floor=math.nan), "cosine: floor", "nan"),
        (lambda: one_minus_sqrt(9, floor=2), "one_minus_sqrt: floor", "2"),
        (lambda: linear(9, start=-1), "linear: start", "-1"),
        (lambda: linear(9, end=math.inf), "linear: end", "inf"),
        (lambda: polynomial(9, power=0), "polynomial: power", "0"),
        (lambda: polynomial(9, floor=2), "polynomial: floor", "2"),
        (lambda: exponential_to(9, 0), "exponential_to: fraction", "0"),
        (lambda: one_cycle(9, rise=1.1), "one_cycle: rise", "1.1"),
        (lambda: one_cycle(9, rise=0.6, three_phase=True), "one_cycle: rise", "0.6"),
        (lambda: one_cycle(9, start=-1), "one_cycle: start", "-1"),
        (lambda: one_cycle(9, peak=-1), "one_cycle: peak", "-1"),
        (lambda: one_cycle(9, end=-1), "one_cycle: end", "-1"),
        (lambda: one_cycle(9, anneal="cos"), "one_cycle: anneal", "'cos'"),
        (lambda: warmup(-1), "warmup: steps", "-1"),
        (lambda: warmup(9, start=2), "warmup: start", "2"),
        (lambda: cosine_restarts(0), "cosine_restarts: period", "0"),
        (lambda: cosine_restarts(9, 0), "cosine_restarts: mult", "0"),
        (lambda: cosine_restarts(9, -1.5), "cosine_restarts: mult", "-1.5"),
        (lambda: cosine_restarts(9, "2"), "cosine_restarts: mult", "'2'"),
        (lambda: cosine_restarts(9, 0.5), "cosine_restarts: mult", "0.5"),
        (lambda: cosine_restarts(9, floor=2), "cosine_restarts: floor", "2"),
        (lambda: cosine_restarts(9, cycles=0), "cosine_restarts: cycles", "0"),
        (lambda: constant(-1), "constant: factor", "-1"),
        (lambda: constant(until=-1), "constant: until", "-1"),
        (lambda: exponential(0), "exponential: gamma", "0"),
        (lambda: exponential(None), "exponential: gamma", "None"),
        (lambda: step_decay(0), "step_decay: every", "0"),
        (lambda: step_decay(9, gamma=0), "step_decay: gamma", "0"),
        (lambda: inverse_sqrt(0), "inverse_sqrt: timescale", "0"),
        (lambda: piecewise((5, 2), (1, 1, 1)), "piecewise: boundaries", "(5, 2)"),
        (lambda: piecewise((2, 2), (1, 1, 1)), "piecewise: boundaries", "(2, 2)"),
        (lambda: piecewise((-2,), (1, 1)), "piecewise: boundaries", "-2"),
        (lambda: piecewise((2,), (1,)), "piecewise: factors", "(1,)"),
        (lambda: piecewise((2,), (1, -1)), "piecewise: factors", "-1"),
        (lambda: warmup_stable_decay(9, -1, 2), "warmup_stable_decay: warmup_steps", "-1"),
        (lambda: warmup_stable_decay(9, 5, 5), "warmup_stable_decay: until", "9"),
        (lambda: warmup_stable_decay(9, 1, 1, tail="sqrt"), "warmup_stable_decay: tail", "'sqrt'"),
        (lambda: warmup_stable_decay(9, 1, 1, floor=2), "warmup_stable_decay: floor", "2"),
        (lambda: cosine(9)(-1), "cosine: step", "-1"),
        (lambda: cosine(9)(0.5), "cosine: step", "0.5"),
        (lambda: exponential(0.5).then(cosine(9)), "then", "exponential(until=None, gamma=0.5)"),
        (lambda: warmup(10).then(cosine(9)), "until=9", "10"),
        (lambda: warmup(10).then(constant(until=9)), "until=9", "10"),
        (lambda: constant(until=10).then(warmup(3).then(cosine(12))), "until=12", "13"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name_and_value(make, name, value):
    with pytest.raises(ValueError) as refusal:
        make()
    assert name in str(refusal.value) and value in str(refusal.value)


def test_only_a_curve_follows_a_curve():
    with pytest.raises(TypeError, match=r"then: 0\.1"):
        warmup(10).then(0.1)


@pytest.mark.parametrize("period, mult", [(10, 1.5), (7, 1.1), (3, 2.5), (5, 1.0), (4, 2.0)])
@pytest.mark.parametrize("floor", [0.0, 0.25])
def test_restarts_with_a_fractional_mult(period, mult, floor):
    """timm's closed form (CosineLRScheduler with cycle_mul): cycles may end between two steps."""
    curve = cosine_restarts(period, mult, floor=floor)
    for t in range(300):
        if mult == 1:
            cycle, length, into = t // period, period, t % period
        else:
            cycle = math.floor(math.log(1 - t / period * (1 - mult), mult) + 1e-12)
            length = mult**cycle * period
            into = t - (1 - mult**cycle) / (1 - mult) * period
        assert curve(t) == pytest.approx(floor + (1 - floor) * (1 + math.cos(math.pi * into / length)) / 2, abs=1e-9)


def test_restarts_with_a_whole_mult_are_the_same_as_floats():
    assert [cosine_restarts(3, 2.0)(t) for t in range(200)] == [cosine_restarts(3, 2)(t) for t in range(200)]


def test_fractional_restarts_end_at_the_step_after_their_last_cycle():
    curve = cosine_restarts(3, 1.5, floor=0.1, cycles=2)  # 3 and 4.5 steps
    assert curve.ends(0) == 8 and curve(7) > 0.1 and curve(8) == pytest.approx(0.1)
    assert curve.then(constant(0.5))(8) == 0.5 and curve.then(constant(0.5))(7) == curve(7)
    shorter = cosine_restarts(8, 0.5, cycles=3)  # 8, 4 and 2 steps
    assert shorter.ends(0) == 14 and shorter(8) == 1 == shorter(12) and shorter(13) == pytest.approx(0.5)
