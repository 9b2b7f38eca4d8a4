"""States in dtypes of their own (``state_dtype``), made, stepped, saved, loaded and converted."""

import copy

import pytest
import torch
from formulas import FormulaOptimizer
from judge import (
    TABLE,
    bits,
    random_problem,
    run,
    stored_in,
)

import trainopt
from trainopt.optim.state_dtype import DTYPES, cast_states

NAMES = [name for name, row in TABLE.items() if row.states]
PARAMS = [torch.float32, torch.bfloat16, torch.float16]
STATES = ["float32", "bfloat16", "float16"]
SHAPES = ((), (7,), (0, 3), (33, 20), (257,))


def states_of(optimizer, params):
    names = optimizer._states
    return [{name: value for name, value in optimizer.state[p].items() if name in names} for p in params]


@pytest.mark.parametrize("stored", STATES)
@pytest.mark.parametrize("dtype", PARAMS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_float32_arithmetic_between_a_load_and_one_rounding(name, dtype, stored, device):
    """Each step, from what is stored, against float64: a state is off by its own rounding alone."""
    row = TABLE[name]
    start, gradients = random_problem(SHAPES, dtype, 3)
    options = {**row.usual, "state_dtype": stored}
    params = [torch.nn.Parameter(p.to(device, copy=True)) for p in start]
    optimizer = row.make(params, **options)
    judge = FormulaOptimizer(row, [torch.nn.Parameter(p.double()) for p in start], row.usual)
    for now in gradients:
        for p, q, g in zip(params, judge.params, now, strict=True):
            p.grad, q.grad = g.to(device, copy=True), g.double()
            q.data.copy_(p.detach().cpu())
            judge.state[q].clear()
            judge.state[q].update(row.held(optimizer.state.get(p, {})))
        optimizer.step()
        judge.step()
        for p, q in zip(params, judge.params, strict=True):
            for key, exact in judge.state[q].items():
                found = optimizer.state[p][key]
                wanted = torch.float32 if key in row.numbers else stored_in(key, stored)
                assert found.dtype == wanted, key
                unit = torch.finfo(found.dtype).eps
                # In float32, numbers of up to 16 may cancel; in float16, the least ones have fewer digits.
                arithmetic = 16 * torch.finfo(torch.float32).eps + torch.finfo(found.dtype).smallest_normal * unit
                error = (found.cpu().double() - exact.double()).abs()
                assert (error <= 0.51 * unit * exact.abs() + arithmetic).all(), (key, error.max())
    assert {row_.path.split(" ")[0] for row_ in trainopt.explain(optimizer)} == {"fused"}


@pytest.mark.parametrize("stored", [*STATES, "8bit"])
def test_a_state_that_begins_at_a_number_is_stored_as_the_group_says(stored, device):
    """Whether the constructor makes it, as torch's Adagrad does, or it is made for a parameter that comes later."""
    first, later = (torch.nn.Parameter(torch.zeros(5000, dtype=torch.float16, device=device)) for _ in range(2))
    optimizer = trainopt.Adagrad([first], initial_accumulator_value=0.25, state_dtype=stored)
    optimizer.add_param_group({"params": [later], "initial_accumulator_value": 0.5})  # which torch does not read
    assert first in optimizer.state and later not in optimizer.state
    optimizer.init_state()
    for p in (first, later):
        state = optimizer.state[p]
        assert state["sum"].dtype is DTYPES[stored] and ("sum_scale" in state) == (stored == "8bit")
        cast_states(optimizer, state, {"state_dtype": "float32"}, p)
        assert state["sum"].shape == p.shape and ((state["sum"] - 0.25).abs() < 1e-6).all()


def test_by_the_name_of_the_state_by_dtype_and_by_group():
    params = [torch.nn.Parameter(torch.ones(4)) for _ in range(3)]
    groups = [
        {"params": params[:1], "state_dtype": {"exp_avg": "bfloat16"}},
        {"params": params[1:2], "state_dtype": torch.float16},
        {"params": params[2:]},
    ]
    optimizer = trainopt.AdamW(groups)
    for p in params:
        p.grad = torch.ones(4)
    optimizer.step()
    found = [
        [state[name].dtype for name in ("exp_avg", "exp_avg_sq")] for state in (optimizer.state[p] for p in params)
    ]
    assert found == [[torch.bfloat16, torch.float32], [torch.float16] * 2, [torch.float32] * 2]
    notes = [row.note for row in trainopt.explain(optimizer)]
    assert "exp_avg in bfloat16, exp_avg_sq in float32" in notes[0] and "state_dtype" not in notes[2]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_torchs_is_rounded_once(name):
    """Or of trainopt's without the option: values go to nearest."""
    row = TABLE[name]
    start, gradients = random_problem(SHAPES, torch.float32, 2)
    optimizer, params = run(row.make, start, gradients, **row.usual)
    other = row.make([torch.nn.Parameter(p.detach().clone()) for p in params], **row.usual, state_dtype="bfloat16")
    other.load_state_dict(optimizer.state_dict())
    for p, q in zip(params, other.param_groups[0]["params"], strict=True):
        for key in states_of(optimizer, [p])[0]:
            rounded = optimizer.state[p][key].to(stored_in(key, "bfloat16"))
            assert torch.equal(bits(other.state[q][key]), bits(rounded))
    for p, q in zip(params, other.param_groups[0]["params"], strict=True):
        p.grad = q.grad = torch.ones_like(p)
    other.step()


@pytest.mark.parametrize("name", NAMES)
def test_converted_midway_and_back(name):
    row = TABLE[name]
    start, gradients = random_problem(SHAPES, torch.float32, 2)
    optimizer, params = run(row.make, start, gradients, **row.usual)
    before = states_of(optimizer, params)
    trainopt.convert_state(optimizer, "bfloat16")
    for was, now in zip(before, states_of(optimizer, params), strict=True):
        assert all(torch.equal(now[key], was[key].to(stored_in(key, "bfloat16"))) for key in was)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for state in states_of(optimizer, params):
        assert all(value.dtype is stored_in(key, "bfloat16") for key, value in state.items())
    trainopt.convert_state(optimizer, None)
    assert {v.dtype for state in states_of(optimizer, params) for v in state.values()} == {torch.float32}
    assert "state_dtype" not in optimizer.param_groups[0]
    optimizer.step()


BAD = {
    "unknown": ("int4", "Invalid state_dtype value: 'int4'"),
    "a dtype that is none of them": (torch.float64, "Invalid state_dtype value: torch.float64"),
    "a number": (16, "Invalid state_dtype value: 16"),
    "a state that there is none of": ({"exp_max": "float32"}, "there is no state 'exp_max'"),
    "an unknown one for a state": ({"exp_avg": "int4"}, "Invalid state_dtype value: 'int4'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    value, message = BAD[case]
    p = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=message):
        trainopt.AdamW([p], state_dtype=value)
    with pytest.raises(ValueError, match=message):
        trainopt.AdamW([{"params": [p], "state_dtype": value}])
    optimizer = trainopt.AdamW([p])
    with pytest.raises(ValueError, match=message):
        trainopt.convert_state(optimizer, value)
    assert "state_dtype" not in optimizer.param_groups[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=str)
def test_parameters_of_other_dtypes_are_refused(dtype):
    p = torch.nn.Parameter(torch.ones(2, dtype=dtype))
    for params in ([p], (p,), iter([p]), [("weight", p)], [{"params": (p,)}], [{"params": [("weight", p)]}]):
        with pytest.raises(ValueError, match=f"one is {dtype}"):
            trainopt.AdamW(params, state_dtype="bfloat16")
    optimizer = trainopt.AdamW([torch.nn.Parameter(torch.ones(2))], state_dtype="bfloat16")
    with pytest.raises(ValueError, match=f"one is {dtype}"):
        optimizer.add_param_group({"params": (p,)})
    assert len(optimizer.param_groups) == 1
    optimizer = trainopt.AdamW([{"params": [p], "state_dtype": None}], state_dtype="bfloat16")
    with pytest.raises(ValueError, match=f"one is {dtype}"):
        trainopt.convert_state(optimizer, "bfloat16")
    with pytest.raises(TypeError, match="SGD is not one of trainopt's"):
        trainopt.convert_state(torch.optim.SGD([p]), "bfloat16")


def test_a_state_of_another_shape_is_refused_before_anything_changes():
    p = torch.nn.Parameter(torch.ones(4).bfloat16())
    optimizer = trainopt.AdamW([p], state_dtype="float32", ema_decay=0.5)
    p.grad = torch.ones_like(p)
    optimizer.step()
    for name in ("exp_avg", "ema"):
        saved = copy.deepcopy(optimizer.state_dict())
        saved["state"][0][name] = torch.ones(3)
        saved["param_groups"][0]["lr"] = 0.5
        before = {key: value.clone() for key, value in optimizer.state[p].items()}
        with pytest.raises(ValueError, match=rf"{name} of a parameter has shape \(3,\).* \(4,\)"):
            optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["lr"] != 0.5
        assert all(torch.equal(value, before[key]) for key, value in optimizer.state[p].items())
