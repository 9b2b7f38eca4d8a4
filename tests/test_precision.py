"""16-bit parameters of more than 16 bits (``precision``): their worth, how they are saved, and what others write."""

import copy
import math
from unittest import mock

import pytest
import torch
from devices import VARIANTS
from judge import (
    TABLE,
    assert_same_bits,
    bits,
    outcome,
    progress_of,
    random_problem,
    run,
)

import trainopt
from trainopt import switches
from trainopt._extension import _C
from trainopt.optim import precision

NAMES = list(TABLE)
SHAPES = ((), (7,), (0, 3), (33, 20), (257,), (1030,))
WAYS = [
    (torch.bfloat16, "master"),
    (torch.bfloat16, "master24"),
    (torch.bfloat16, "stochastic"),
    (torch.float16, "master"),
    (torch.float16, "stochastic"),
]


def values_of(optimizer, params):
    masters = [optimizer.state.get(p, {}).get("master") for p in params]
    return [
        precision.value_of(p.detach().cpu(), {} if master is None else {"master": master.cpu()})
        for p, master in zip(params, masters, strict=True)
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_with_a_master_training_is_float32s_bit_for_bit(name, dtype, device):
    """With float32 states, and the gradients that the 16-bit parameters would have had."""
    row = TABLE[name]
    start, gradients = random_problem(SHAPES, dtype, 5)
    there = random_problem(SHAPES, dtype, 5, device=device)
    ours, params = run(row.make, *there, **row.usual, precision="master", state_dtype="float32")
    wide = [[g.float() for g in now] for now in gradients]
    truth, others = run(row.make, [p.float() for p in start], wide, **row.usual)
    for p, q, value in zip(params, others, values_of(ours, params), strict=True):
        assert torch.equal(bits(value), bits(q))
        assert p.dtype is dtype and ((value - p.detach().cpu().float()).abs() <= 0.5001 * spacing(p)).all()
        for key in row.states:
            if ours.state[p].get(key) is not None:
                assert torch.equal(bits(ours.state[p][key].cpu()), bits(truth.state[q][key]))
    assert {row_.path.split(" ")[0] for row_ in trainopt.explain(ours)} == {"fused"}


def spacing(p):
    info = torch.finfo(p.dtype)
    return info.eps * 2.0 ** p.detach().cpu().float().abs().clamp(min=info.smallest_normal).log2().floor()


@pytest.mark.parametrize("way", [way for way in WAYS if way[1] != "master"], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_step_from_what_is_stored_is_rounded_once(name, way, device):
    """Each step, against the float32 step from the same numbers: half a unit of 24 bits, or less than one of 16."""
    dtype, stored = way
    row = TABLE[name]
    start, gradients = random_problem(SHAPES, dtype, 4)
    options = {**row.usual, "precision": stored, "state_dtype": "float32"}
    params = [torch.nn.Parameter(p.to(device, copy=True)) for p in start]
    optimizer = row.make(params, **options)
    for now in gradients:
        before = values_of(optimizer, params)
        plain = [torch.nn.Parameter(value.clone()) for value in before]
        judge = row.make(plain, **row.usual)
        judge.param_groups[0].update(progress_of(optimizer))
        for p, q, g in zip(params, plain, now, strict=True):
            p.grad, q.grad = g.to(device), g.float()
            state = optimizer.state.get(p, {})
            held = {
                k: state[k].to("cpu", copy=True)
                for k in (*row.states, *row.numbers, "step")
                if state.get(k) is not None
            }
            if held:
                judge.state[q].update(held if row.ours._counts_steps else {k: held[k] for k in held if k != "step"})
        optimizer.step()
        judge.step()
        for p, q, value in zip(params, plain, values_of(optimizer, params), strict=True):
            unit = spacing(p) * (2.0**-9 if stored == "master24" else 1.001)
            assert ((value - q).abs() <= unit).all()


# What it is for -------------------------------------------------------------------------------------------------------


def small_steps(dtype, stored, steps=100, elements=1, **options):
    """Parameters of 1 after steps of 1e-4, which is less than half a unit of bfloat16."""
    p = torch.nn.Parameter(torch.ones(elements, dtype=dtype))
    optimizer = trainopt.SGD([p], lr=1e-4, precision=stored, **options)
    for _ in range(steps):
        p.grad = torch.ones_like(p)
        optimizer.step()
    return p, precision.value_of(p, optimizer.state.get(p, {}))


def test_steps_below_a_bfloat16s_unit():
    exact = torch.ones(())
    for _ in range(100):
        exact = exact - torch.tensor(1e-4)
    assert (small_steps(torch.bfloat16, "native")[1] == 1).all()
    p, value = small_steps(torch.bfloat16, "master")
    assert value.item() == exact.item() and p.item() == exact.bfloat16().item()
    _, value = small_steps(torch.bfloat16, "master24")
    assert abs(value.item() - exact.item()) <= 100 * 2.0**-17  # half of its unit in each step


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounded_at_random_the_mean_is_right(dtype):
    """Of 40,000 numbers and 10 seeds: 5 standard errors are passed once in two million runs."""
    found = torch.cat([small_steps(dtype, "stochastic", 20, 4000, seed=s)[1] for s in range(10)])
    exact = 1 - 20 * 1e-4
    error = found.double().std() / math.sqrt(found.numel())
    assert error > 0 and abs(found.double().mean() - exact) <= 5 * error
    assert not torch.equal(small_steps(dtype, "stochastic", 20, 4000, seed=0)[1], found[4000:8000])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-5, 3e-8])
def test_rounding_at_random_keeps_what_fits_and_goes_to_a_neighbour(dtype, scale):
    start = (torch.randn(5000) * scale).to(dtype)
    p = torch.nn.Parameter(start.clone())
    optimizer = trainopt.SGD([p], lr=1.0, precision="stochastic")
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(bits(p), bits(start))
    p.grad = (torch.randn(5000) * scale / 300).to(dtype)
    exact = start.double() - p.grad.double()
    optimizer.step()
    low, high = exact.float().to(dtype), exact.float().to(dtype)
    unit = torch.maximum(spacing(low), spacing(high)).double() if scale != 3e-8 else torch.tensor(2.0**-24).double()
    if dtype is torch.float16 or scale != 3e-8:
        assert ((p.double() - exact).abs() < 1.0001 * unit.clamp(min=2.0**-24 if dtype is torch.float16 else 0)).all()
    for value in (math.inf, -math.inf, math.nan):
        p.data[0] = value
        p.grad = torch.zeros_like(p)
        optimizer.step()
        assert torch.equal(p[:1].float(), torch.tensor([value])) or (math.isnan(value) and p[0].isnan())


# What others do -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", ["master", "master24"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_parameter_that_somebody_else_writes(dtype, stored):
    """A bfloat16 keeps its rest: it is within half a unit of what was written; zeros and infinities are themselves. A
    float16 is what was written."""
    if dtype is torch.float16 and stored == "master24":
        return
    p = torch.nn.Parameter(torch.randn(3000).to(dtype))
    optimizer = trainopt.SGD([p], lr=0.0, precision=stored)

    def step():
        p.grad = torch.randn(3000).to(dtype)
        optimizer.step()
        return precision.value_of(p, optimizer.state[p])

    optimizer.param_groups[0]["lr"] = 1e-3
    step()
    optimizer.param_groups[0]["lr"] = 0.0
    written = torch.randn(3000).to(dtype)
    written[:100], written[100:200], written[200:300] = 0.0, -0.0, math.inf
    for write in (lambda: p.data.copy_(written), lambda: p.detach().copy_(written)):
        with torch.no_grad():
            write()
        value = step()
        assert torch.equal(p[:300].float().abs(), written[:300].float().abs())
        assert (value[:200].abs() < 1e-30).all() and (value[200:300] > 3.38e38).all()
        assert ((value[300:] - written[300:].float()).abs() <= 0.5001 * spacing(written[300:])).all()
        assert torch.equal(bits(p[300:]), bits(written[300:]))
        if dtype is torch.float16:
            assert (value[300:] == written[300:].float()).float().mean() > 0.99  # but for what was there already


@pytest.mark.parametrize("to", ["native", "master", "master24", "stochastic"])
@pytest.mark.parametrize("stored", ["native", "master", "master24", "stochastic"])
def test_converted_midway(stored, to):
    start, gradients = random_problem(SHAPES, torch.bfloat16, 3)
    optimizer, params = run(trainopt.AdamW, start, gradients, precision=stored, lr=1e-2)
    before = values_of(optimizer, params)
    trainopt.convert_state(optimizer, "8bit", precision=to)
    assert optimizer.param_groups[0].get("precision", "native") == to
    for p, was, now in zip(params, before, values_of(optimizer, params), strict=True):
        assert ("master" in optimizer.state[p]) == to.startswith("master")
        digits = {"master": 0.0, "master24": 2.0**-9}.get(to, 0.5001)
        assert ((was - now).abs() <= digits * spacing(p)).all()
        p.grad = torch.ones_like(p)
    optimizer.step()
    trainopt.convert_state(optimizer, None, precision="native")
    stock = torch.optim.AdamW([torch.nn.Parameter(p.detach().clone()) for p in params])
    stock.load_state_dict(optimizer.state_dict())
    for p in stock.param_groups[0]["params"]:
        assert stock.state[p].keys() == {"step", "exp_avg", "exp_avg_sq"}


def test_parameters_of_other_dtypes_are_stepped_as_they_are():
    start, gradients = random_problem(SHAPES, torch.float32, 3)
    plain = outcome(*run(trainopt.AdamW, start, gradients))
    for stored in ("master", "master24", "stochastic"):
        assert_same_bits(plain, outcome(*run(trainopt.AdamW, start, gradients, precision=stored)))


def test_the_group_says_which_and_explain_tells():
    params = [torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = trainopt.AdamW([{"params": params[:1], "precision": "master"}, {"params": params[1:]}])
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    notes = [row.note for row in trainopt.explain(optimizer)]
    assert "precision='master'" in notes[0] and "precision" not in notes[1]
    assert "6 bytes of state" in notes[0] and not notes[1]


def test_bad_input():
    p = torch.nn.Parameter(torch.ones(2, dtype=torch.float16))
    with pytest.raises(ValueError, match="precision='master24' is for bfloat16"):
        trainopt.AdamW([p], precision="master24")
    optimizer = trainopt.AdamW([p])
    with pytest.raises(ValueError, match="Invalid precision value: 'double'"):
        trainopt.convert_state(optimizer, None, precision="double")
    with pytest.raises(ValueError, match="is for bfloat16"):
        trainopt.convert_state(optimizer, "8bit", precision="master24")
    assert "state_dtype" not in optimizer.param_groups[0]


@pytest.mark.parametrize("stored", ["master", "master24"])
def test_what_is_beside_a_parameter_of_another_dtype_is_not_taken_for_its_own(stored):
    p = torch.nn.Parameter(torch.ones(40, dtype=torch.bfloat16))
    optimizer = trainopt.AdamW([p], precision=stored, lr=1e-3)
    p.grad = torch.ones_like(p)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    half = torch.nn.Parameter(torch.ones(40, dtype=torch.float16))
    other = trainopt.AdamW([half], lr=1e-3)
    if stored == "master24":
        with pytest.raises(ValueError, match="is for bfloat16"):
            other.load_state_dict(saved)
        return
    other.load_state_dict(saved)
    half.grad = torch.ones_like(half)
    other.step()
    assert (half - 1).abs().max() < 3e-3 and other.state[half]["master"].dtype is torch.float32


def test_nothing_is_converted_where_that_cannot_be():
    p, q = (torch.nn.Parameter(torch.ones(5000)) for _ in range(2))
    optimizer = trainopt.AdamW([p, q], state_dtype="8bit", ema_decay=0.5)
    for param in (p, q):
        param.grad = torch.ones_like(param)
    optimizer.step()
    with optimizer.averaged_parameters(), pytest.raises(RuntimeError, match="averaged_parameters"):
        trainopt.convert_state(optimizer, None)
    for broken in (torch.zeros(3), optimizer.state[q]["exp_avg_scale"].double()):
        optimizer.state[q]["exp_avg_scale"] = broken
        with pytest.raises(ValueError, match="exp_avg_scale"):
            trainopt.convert_state(optimizer, "bfloat16")
        assert optimizer.state[p]["exp_avg"].dtype is torch.uint8
        assert optimizer.param_groups[0]["state_dtype"] == "8bit"
    differentiable = trainopt.AdamW([p], differentiable=True)
    with pytest.raises(ValueError, match="differentiable"):
        trainopt.convert_state(differentiable, "8bit")


# Cautious weight decay ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("name", ["AdamW", "Lion"])
def test_cautious_decay_acts_where_it_agrees_with_the_update(name, dtype, reference):
    """Against the step without decay, which is the update: what is beside it is the decay."""
    row = TABLE[name]
    start, gradients = random_problem(((40,), (5, 7)), dtype if not dtype.is_complex else torch.float32, 1)
    if dtype.is_complex:
        start, gradients = [torch.complex(p, p.flip(0)) for p in start], [[torch.complex(g, -g) for g in gradients[0]]]
    options = {"lr": 0.1, "weight_decay": 0.5}
    with mock.patch.object(switches, "REFERENCE_FORCED", reference):
        _, found = run(row.make, start, gradients, **options, cautious_weight_decay=True)
        _, updated = run(row.make, start, gradients, **{**options, "weight_decay": 0.0})
    for p, q, before in zip(found, updated, start, strict=True):
        real = [torch.view_as_real(t) if t.is_complex() else t for t in (p.detach(), q.detach(), before)]
        p, q, before = (t.double() for t in real)
        decay = torch.where((before - q) * before >= 0, 0.05 * before, 0.0)
        tolerance = 4 * torch.finfo(dtype if not dtype.is_complex else torch.float32).eps
        assert ((p - (q - decay)).abs() <= tolerance * (before.abs() + 0.2)).all()
        assert (decay != 0).any() and (decay == 0).any()


def test_cautious_decay_is_for_decoupled_decay():
    p = torch.nn.Parameter(torch.ones(2))
    for name in ("SGD", "Adam", "LAMB", "LARS"):
        with pytest.raises(ValueError, match="cautious_weight_decay=True is for weight decay that is decoupled"):
            getattr(trainopt, name)([p], lr=0.1, cautious_weight_decay=True)
    trainopt.Adam([p], decoupled_weight_decay=True, cautious_weight_decay=True)
    assert "cautious" in trainopt.explain(trainopt.AdamW([p], cautious_weight_decay=True))[0].note


def test_without_decay_caution_changes_nothing():
    start, gradients = random_problem(SHAPES, torch.float32, 3)
    plain = outcome(*run(trainopt.AdamW, start, gradients, weight_decay=0.0))
    cautious = outcome(*run(trainopt.AdamW, start, gradients, weight_decay=0.0, cautious_weight_decay=True))
    assert_same_bits(plain, cautious)


INF = math.inf
AS_WITHOUT = [INF, -INF, 0.89, INF]
#: What becomes of infinite parameters, whose decay is infinite too.
INFINITE = {
    "neither": ({"weight_decay": 0.1}, AS_WITHOUT),
    "cautious": ({"weight_decay": 0.1, "cautious": True}, AS_WITHOUT),
    "cautious, no decay": ({"weight_decay": 0.0, "cautious": True}, [INF, -INF, 0.9, INF]),
    "cautious decay": ({"weight_decay": 0.1, "cautious_weight_decay": True}, [math.nan, -INF, 0.89, INF]),
    "both, no decay": ({"weight_decay": 0.0, "cautious": True, "cautious_weight_decay": True}, [INF, -INF, 0.9, INF]),
}


@pytest.mark.parametrize("options, expected", INFINITE.values(), ids=INFINITE)
@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("name", ["AdamW", "Lion"])
def test_caution_with_infinite_parameters(name, reference, options, expected):
    with mock.patch.object(switches, "REFERENCE_FORCED", reference):
        gradient = torch.tensor([1.0, 1.0, 1.0, -1.0])
        start = torch.tensor([INF, -INF, 1.0, INF])
        _, (p,) = run(getattr(trainopt, name), [start], [[gradient]], lr=0.1, **options)
    torch.testing.assert_close(p.detach(), torch.tensor(expected), equal_nan=True)


def test_every_variant_rounds_at_random_as_it_is_said():
    """The 16 bits of an element are those of its place, in any range."""
    whole = torch.empty(3000, dtype=torch.int16)
    _C.rounding_bits_(whole, 7, 3, 1)
    for variant in VARIANTS:
        _C.set_cpu_variant(variant)
        part = torch.empty(1001, dtype=torch.int16)
        _C.rounding_bits_(part, 7, 3, 1)
        assert torch.equal(part, whole[:1001])
    assert abs(whole.float().mean()) < 5 * 65536 / math.sqrt(12 * 3000)
