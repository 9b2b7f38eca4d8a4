"""Prodigy's d, which all parameters have in common: its numbers in the groups, one way for all parameters of a step."""

import copy
import functools
import math
from unittest import mock

import pytest
import torch
from judge import TABLE, assert_same_bits, outcome, random_problem, run

import trainopt
from trainopt import switches
from trainopt.optim.precision import value_of

ROW = TABLE["Prodigy"]
NUMBERS = ("d", "d_max", "d_numerator", "d_denom", "d_hat", "k")
each_path = pytest.mark.parametrize("make", ["make", "make_plain_loop"], ids=["engine", "plain step"])


def numbers_of(optimizer):
    first, *others = ({name: group.get(name) for name in NUMBERS} for group in optimizer.param_groups)
    assert all(other == first for other in others)
    return first


def parameters(*shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)) for shape in shapes
    ]


def descend(optimizer, params, steps, noise=0.1):
    """Steps down a bowl whose bottom is at 3."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in params:
            around = noise * torch.randn(p.shape, dtype=torch.float64, generator=generator)
            p.grad = (p.detach() - 3 + around.to(p.dtype)).to(p.dtype)
        optimizer.step()
    return optimizer


DOWN = {
    "default": {},
    "decoupled": {"weight_decay": 0.01, "use_bias_correction": True, "safeguard_warmup": True, "d_coef": 0.7},
    "coupled": dict(betas=(0.0, 0.99), beta3=0.9, growth_rate=1.05, decouple=False, weight_decay=0.01, lr=0.5),
}
SHAPES_DOWN = ((30, 7), (257,), ())


@functools.cache
def formula_down(case):
    """The formula's optimizer and its parameters, after 300 steps."""
    exact = parameters(*SHAPES_DOWN)
    return descend(ROW.make_formula(exact, **DOWN[case]), exact, 300), exact


@pytest.mark.parametrize("case", DOWN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_path
def test_hundreds_of_steps_are_the_formulas(make, case, dtype):
    """From d0 = 1e-6 up to where the bowl's bottom is. The first steps are a few units of a float32 near 1."""
    params = parameters(*SHAPES_DOWN, dtype=dtype)
    optimizer = descend(getattr(ROW, make)(params, **DOWN[case]), params, 300)
    formula, exact = formula_down(case)
    assert formula.numbers["d"] > 0.01 and formula.numbers["k"] == 300
    found, tolerance = numbers_of(optimizer), 2e-2 if dtype == torch.float32 else 1e-9
    for name in ("d", "d_max", "d_numerator", "k"):
        assert math.isclose(found[name], formula.numbers[name], rel_tol=tolerance), name
    for p, q in zip(params, exact, strict=True):
        assert (p.detach() - q.detach()).abs().mean() <= tolerance


def test_engine_and_plain_step_find_the_same_numbers():
    found = []
    for make in (ROW.make, ROW.make_plain_loop):
        params = parameters((300, 7), (9,), dtype=torch.float32)
        found.append(numbers_of(descend(make(params), params, 50)))
    for name, value in found[0].items():
        assert math.isclose(value, found[1][name], rel_tol=1e-4), name  # torch's root is rounded otherwise
    assert found[0]["d"] > 1e-6 and found[0]["k"] == 50


@each_path
def test_groups_have_one_d(make):
    """As parameters of one group do; each with its own decay and epsilon."""
    params, others = parameters((20, 3), (7,)), parameters((20, 3), (7,))
    one = descend(getattr(ROW, make)(params), params, 40)
    several = getattr(ROW, make)([{"params": others[:1]}, {"params": others[1:]}])
    descend(several, others, 40)
    assert numbers_of(one) == numbers_of(several)
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
    decayed = parameters((20, 3), (7,))
    descend(getattr(ROW, make)([{"params": decayed[:1], "weight_decay": 0.5}, {"params": decayed[1:]}]), decayed, 40)
    assert not torch.equal(decayed[0], others[0])


@each_path
def test_a_group_that_is_added_has_the_d_of_the_others(make):
    params = parameters((20, 3), (7,))
    optimizer = descend(getattr(ROW, make)(params[:1]), params[:1], 40)
    before = optimizer.param_groups[0]["d"]
    optimizer.add_param_group({"params": params[1:]})
    descend(optimizer, params, 1)
    assert numbers_of(optimizer)["k"] == 41 and optimizer.param_groups[1]["d_max"] >= before > 1e-6


@each_path
def test_a_group_with_a_learning_rate_of_0_rests(make):
    params, alone = parameters((20, 3), (7,)), parameters((20, 3))
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.0, "weight_decay": 0.5}]
    before = params[1].detach().clone()
    optimizer = descend(getattr(ROW, make)(groups), params, 40, noise=0.0)
    assert torch.equal(before, params[1]) and not optimizer.state[params[1]]["exp_avg_sq"].any()
    only = descend(getattr(ROW, make)(alone), alone, 40, noise=0.0)
    assert torch.equal(params[0], alone[0]) and numbers_of(only) == numbers_of(optimizer)


@each_path
@pytest.mark.parametrize("case", ["lr 0", "no gradient"])
def test_a_step_that_tells_nothing_moves_nothing(make, case):
    params = parameters((20, 3))
    optimizer = getattr(ROW, make)(params, lr=0.0 if case == "lr 0" else 1.0)
    before = params[0].detach().clone()
    for _ in range(3):
        params[0].grad = torch.full_like(params[0], 0.5 if case == "lr 0" else 0.0)
        optimizer.step()
    assert torch.equal(before, params[0])
    assert numbers_of(optimizer)["k"] == 0 and optimizer.param_groups[0]["d"] == 1e-6


@pytest.mark.parametrize("difference", [{"lr": 0.5}, {"betas": (0.9, 0.99)}, {"d_coef": 2.0}, {"d0": 1e-5}], ids=str)
def test_groups_that_differ_in_what_there_is_one_of_are_refused(difference):
    params = parameters((3,), (4,))
    optimizer = ROW.make([{"params": params[:1]}, {"params": params[1:], **difference}])
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match=f"one {'lr' if 'lr' in difference else 'd'} for all groups"):
        descend(optimizer, params, 1)
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


# One way for all ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5, "cautious": True}], ids=["plain", "options"])
def test_parameters_beside_one_that_the_engine_does_not_take(options):
    """A complex one, which is a pair of reals: as if all had been real, and all by the plain step."""
    (a, b), (c, d) = parameters((20, 3), (10, 2)), parameters((20, 3), (10, 2))
    mixed = [a, torch.nn.Parameter(torch.view_as_complex(b.detach()))]
    one, other = ROW.make(mixed, **options), ROW.make([c, d], **options)
    paths = trainopt.explain(one)
    assert [row.path for row in paths] == ["torch", "torch"] and "all parameters" in paths[0].reason
    assert all(row.path.startswith("fused") for row in trainopt.explain(other))
    for _ in range(40):
        for p, q in zip(mixed, (c, d), strict=True):
            q.grad = q.detach() - 3
            p.grad = torch.view_as_complex(q.grad.clone()) if p.is_complex() else q.grad.clone()
        one.step()
        other.step()
    assert numbers_of(one)["d"] == pytest.approx(numbers_of(other)["d"], rel=1e-9) != 1e-6
    torch.testing.assert_close(a, c)
    torch.testing.assert_close(torch.view_as_real(mixed[1].detach()), d.detach())


def test_arithmetics_beside_each_other_and_memory_that_is_shared():
    """float32 and float64 go one way; of parameters over one memory, the plain step sees to all."""
    shared = torch.ones(6)
    params = [*parameters((9,), dtype=torch.float32), *parameters((9,), dtype=torch.float64)]
    assert all(row.path.startswith("fused") for row in trainopt.explain(ROW.make(params)))
    optimizer = descend(ROW.make(params), params, 30)
    assert numbers_of(optimizer)["k"] == 30
    views = [torch.nn.Parameter(shared[:4]), torch.nn.Parameter(shared[2:]), *params]
    optimizer = ROW.make(views)
    assert numbers_of(descend(optimizer, views, 3))["k"] == 3
    assert not any(row.path.startswith("fused") for row in trainopt.explain(optimizer))


def test_states_that_are_made_late():
    """The first step with a gradient makes them: p0 is what the parameter is then."""
    params = parameters((9,), (5,))
    optimizer = descend(ROW.make(params), params[:1], 10)
    assert params[1] not in optimizer.state
    params[1].data.add_(1)
    start = params[1].detach().clone()
    descend(optimizer, params, 10)
    assert torch.equal(optimizer.state[params[1]]["p0"], start) and numbers_of(optimizer)["k"] == 20


@each_path
def test_a_step_that_is_left_out_leaves_the_numbers(make):
    params = parameters((20,), dtype=torch.float32)
    optimizer = descend(getattr(ROW, make)(params, skip_nonfinite=True), params, 10)
    before = numbers_of(optimizer)
    params[0].grad = torch.full_like(params[0], torch.inf)
    optimizer.step()
    assert optimizer.last_step_skipped and numbers_of(optimizer) == before


def test_a_step_that_only_makes_states_leaves_the_numbers():
    params = parameters((20,))
    optimizer = ROW.make(params)
    optimizer.init_state()
    assert torch.equal(optimizer.state[params[0]]["p0"], params[0]) and numbers_of(optimizer)["k"] == 0


# State dicts ----------------------------------------------------------------------------------------------------------


def test_numbers_are_in_the_state_dict():
    params = parameters((20, 3), (7,))
    optimizer = descend(ROW.make(params), params, 30)
    again = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = ROW.make(again)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert numbers_of(resumed) == numbers_of(optimizer)
    descend(optimizer, params, 5)
    descend(resumed, again, 5)
    assert_same_bits(outcome(optimizer, params), outcome(resumed, again))


def test_a_state_dict_of_the_authors_package():
    """s and p0 are flat there, p0 of zeros is one 0, and counts are ints."""
    params = [*parameters((20, 3)), torch.nn.Parameter(torch.zeros(4, 2, dtype=torch.float64))]
    optimizer = descend(ROW.make(params), params, 30)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state.update(s=state["s"].flatten(), p0=state["p0"].flatten(), step=int(state["step"]))
    saved["state"][1]["p0"] = torch.tensor(0.0, dtype=torch.float64)
    for group in saved["param_groups"]:
        for name in ("maximize", "foreach", "capturable", "differentiable", "fused"):
            del group[name]
        group.update(fsdp_in_use=False, slice_p=1)
    again = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = ROW.make(again)
    resumed.load_state_dict(saved)
    assert all(row.path.startswith("fused") for row in trainopt.explain(resumed))
    descend(optimizer, params, 5)
    descend(resumed, again, 5)
    assert_same_bits(outcome(optimizer, params), outcome(resumed, again))
    saved["param_groups"][0]["slice_p"] = 11
    with pytest.raises(ValueError, match="slice_p=11"):
        resumed.load_state_dict(saved)


# Storage --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", ["8bit", "bfloat16", {"exp_avg": "8bit", "exp_avg_sq": "8bit"}], ids=str)
def test_p0_and_s_are_kept_as_precise_as_the_parameter(chosen):
    params = parameters((40, 300), dtype=torch.float32)
    optimizer = descend(ROW.make(params, state_dtype=chosen), params, 60)
    state = optimizer.state[params[0]]
    assert state["p0"].dtype == state["s"].dtype == torch.float32
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype != torch.float32
    whole = parameters((40, 300), dtype=torch.float32)
    exact = numbers_of(descend(ROW.make(whole), whole, 60))
    assert numbers_of(optimizer)["d"] == pytest.approx(exact["d"], rel=0.05) and exact["d"] > 1e-3


def test_other_storage_of_p0_is_refused():
    for name in ("p0", "s"):
        with pytest.raises(ValueError, match=f"Invalid state_dtype of {name!r}: '8bit'"):
            ROW.make(parameters((3,), dtype=torch.float32), state_dtype={name: "8bit"})
    half = parameters((400,), dtype=torch.bfloat16)
    optimizer = descend(ROW.make(half, state_dtype="float32", precision="master"), half, 2)
    assert optimizer.state[half[0]]["p0"].dtype == torch.float32


@pytest.mark.parametrize("precision", ["native", "master", "master24", "stochastic"])
@pytest.mark.parametrize("state_dtype", [None, "8bit"])
def test_16_bit_parameters_by_both_paths(precision, state_dtype):
    start, gradients = random_problem((5000, 4097), torch.bfloat16, 5, 3)
    options = {**ROW.usual, "precision": precision, "state_dtype": state_dtype}
    results = []
    for reference in (False, True):
        with mock.patch.object(switches, "REFERENCE_FORCED", reference):
            optimizer, params = run(ROW.make, start, gradients, **options)
        states = [optimizer.state[p] for p in params]
        results.append(
            [value_of(p, state) for p, state in zip(params, states, strict=True)]
            + [state["s"].float() for state in states]
        )
        assert all(state["p0"].equal(p) for state, p in zip(states, start, strict=True))
    for found, plain in zip(*results, strict=True):
        off = (found - plain).abs() > 1e-6 + 1e-5 * plain.abs()
        assert off.float().mean() < 1e-3  # rounded to the other side


# What does not go -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"d0": 0.0}, "Invalid d0 value: 0.0"),
        ({"d_coef": 0.0}, "Invalid d_coef value: 0.0"),
        ({"growth_rate": 0.5}, "Invalid growth_rate value: 0.5"),
        ({"beta3": 1.0}, "Invalid beta3 value: 1.0"),
        ({"eps": -1.0}, "Invalid epsilon value: -1.0"),
        ({"betas": (0.9, 1.0)}, "Invalid beta parameter at index 1: 1.0"),
        ({"slice_p": 11}, "slice_p=11"),
        ({"fsdp_in_use": True}, "fsdp_in_use=True"),
        ({"differentiable": True}, "differentiable=True"),
    ],
    ids=str,
)
def test_options_that_are_refused(bad, words):
    with pytest.raises(ValueError, match=words):
        trainopt.Prodigy(parameters((2,)), **bad)


def test_an_option_that_is_set_later_is_refused_too():
    params = parameters((2,))
    optimizer = trainopt.Prodigy(params)
    optimizer.param_groups[0]["slice_p"] = 2
    with pytest.raises(ValueError, match="slice_p=2"):
        descend(optimizer, params, 1)


def test_no_step_in_backward():
    model = torch.nn.Linear(2, 3)
    with pytest.raises(ValueError, match="all gradients at once"):
        trainopt.step_in_backward(model, trainopt.Prodigy(model.parameters()))


def test_a_compiled_step_runs_as_it_is():
    start, gradients = random_problem((300, 7), torch.float32, 3, 5)
    plain, params = run(ROW.make, start, gradients, **ROW.usual)

    def compiled(params, **options):
        optimizer = ROW.make(params, **options)
        optimizer.step = torch.compile(optimizer.step, backend="eager")
        return optimizer

    other, others = run(compiled, start, gradients, **ROW.usual)
    assert_same_bits(outcome(plain, params), outcome(other, others))
    assert numbers_of(plain) == numbers_of(other)
    operator = torch.ops.trainopt.optimizer_step_
    with pytest.raises(ValueError, match="depends on the parameters of all groups"):
        operator("prodigy", [], [], [], [], torch.ones(()), [0.9, 0.99, 0.9, *[0.0] * 11])
