"""The schedule-free optimizers: hundreds of steps, the numbers of their groups, how z is stored, what is refused."""

import itertools
import math

import pytest
import torch
from helpers import OPTIONS, assert_same_bits, error_of, snapshot
from optimizer_table import TABLE
from schedule_free import NAMES, assert_same_values, each_class, numbers, step, stepped, values

import trainopt
from trainopt.schedules import cosine

# Hundreds of steps ----------------------------------------------------------------------------------------------------

LONG = {
    "AdamWScheduleFree": [{}, {"weight_decay": 0.1, "warmup_steps": 50, "r": 1.5, "betas": (0.95, 0.99)}],
    "RAdamScheduleFree": [{"weight_decay": 0.1, "r": 0.5}, {"silent_sgd_phase": False, "betas": (0.8, 0.99)}],
    "SGDScheduleFree": [{"lr": 0.1}, {"lr": 0.1, "weight_decay": 0.1, "warmup_steps": 100, "weight_lr_power": 1.0}],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("name", "options"), [(name, options) for name in NAMES for options in LONG[name]])
def test_hundreds_of_steps_down_a_bowl(name, options, dtype):
    """Two groups with learning rates of their own, against the formula of x, y and z in float64."""
    row, steps = TABLE[name], 400
    generator = torch.Generator().manual_seed(3)
    start = [torch.randn(41, dtype=torch.float64, generator=generator) for _ in range(2)]
    noise = [[torch.randn(41, dtype=torch.float64, generator=generator) for _ in start] for _ in range(steps)]
    params = [torch.nn.Parameter(p.to(dtype, copy=True)) for p in start]
    defaults = row.defaults["lr"]
    rates = [options.get("lr", defaults), 3 * options.get("lr", defaults)]
    groups = [{"params": [p], "lr": lr} for p, lr in zip(params, rates, strict=True)]
    optimizer = row.make(groups, **options)
    truths = [
        row.make_formula([torch.nn.Parameter(p.clone())], **{**options, "lr": lr})
        for p, lr in zip(start, rates, strict=True)
    ]
    for now in noise:
        for p, truth, g in zip(params, truths, now, strict=True):
            (q,) = truth.params
            q.grad = q.detach() + 0.3 * g
            p.grad = q.grad.to(dtype)
            truth.step()
        optimizer.step()
    slack = 1e-11 if dtype is torch.float64 else 3e-5
    for p, truth, begun in zip(params, truths, start, strict=True):
        (q,) = truth.params
        torch.testing.assert_close(p.detach().double(), q.detach(), rtol=slack, atol=slack)
        torch.testing.assert_close(optimizer.state[p]["z"].double(), truth.state[q]["z"], rtol=slack, atol=slack)
        assert (q - begun).abs().mean() > 0.1  # of parameters that hardly moved all formulas are right
    assert [group["k"] for group in optimizer.param_groups] == [steps, steps]


@each_class
def test_the_average_is_that_of_the_iterates(name):
    """In eval mode the parameter is the mean of all z, with weights that follow from the definition."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(9, dtype=torch.float64))
    optimizer = getattr(trainopt, name)([p], **{**OPTIONS[name], "r": 2.0, "weight_lr_power": 1.0})
    optimizer.train()
    weighted, total, largest = torch.zeros_like(p), 0.0, 0.0
    for k in range(30):
        step(optimizer, [p], seed=k)
        largest = max(largest, optimizer.param_groups[0]["scheduled_lr"])
        weight = (k + 1) ** 2 * largest
        weighted, total = weighted + weight * optimizer.state[p]["z"], total + weight
    optimizer.eval()
    torch.testing.assert_close(p.detach(), (weighted / total).detach(), rtol=1e-13, atol=1e-13)
    assert optimizer.param_groups[0]["weight_sum"] == pytest.approx(total, rel=1e-14)


# Numbers of the groups ------------------------------------------------------------------------------------------------

KEYS = {"params", "lr", "r", "k", "train_mode", "weight_sum", "lr_max", "scheduled_lr", "weight_lr_power"}
KEYS |= {"weight_decay"}
OWN_KEYS = {
    "AdamWScheduleFree": {"betas", "eps", "warmup_steps", "foreach"},
    "RAdamScheduleFree": {"betas", "eps", "silent_sgd_phase", "foreach"},
    "SGDScheduleFree": {"momentum", "warmup_steps", "foreach"},
}


@each_class
def test_the_keys_are_the_authors(name):
    optimizer, params = stepped(name)
    beside = {"maximize", "capturable", "differentiable", "fused"}  # of torch's optimizers
    assert set(optimizer.param_groups[0]) == KEYS | OWN_KEYS[name] | beside
    assert set(optimizer.state[params[1]]) == {"z"} | ({"exp_avg_sq"} if name != "SGDScheduleFree" else set())


def test_warm_up_and_a_changing_rate_are_in_the_weights():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = trainopt.SGDScheduleFree([p], lr=0.8, warmup_steps=4, r=1.0, weight_lr_power=2.0)
    optimizer.train()
    rates = [0.2, 0.4, 0.6, 0.8, 0.4, 0.8]
    weights = [(k + 1) * rate**2 for k, rate in enumerate(itertools.accumulate(rates, max))]
    for k, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = 0.4 if k == 4 else 0.8
        step(optimizer, [p])
        (found,) = numbers(optimizer)
        assert found["k"] == k + 1 and found["scheduled_lr"] == pytest.approx(rate)
        assert found["lr_max"] == pytest.approx(max(rates[: k + 1]))
        assert found["weight_sum"] == pytest.approx(sum(weights[: k + 1]))


def not_made(kind, optimizer, params):
    """A step that is not made, for one reason or another."""
    for p in params:
        p.grad = torch.ones_like(p)
    if kind == "asks for states":
        for p in params:
            p.grad.zero_()
            del optimizer.state[p]
        optimizer.param_groups[0]["lr"] = 0.0
    else:
        params[1].grad[2] = math.nan
    if kind == "found_inf":
        optimizer.found_inf, optimizer.grad_scale = torch.tensor(1.0), torch.tensor(4.0)
    if kind == "raises":
        with pytest.raises(RuntimeError, match="non-finite"):
            optimizer.step()
    else:
        optimizer.step()


@pytest.mark.parametrize(
    ("kind", "options"),
    {
        "found_inf": {"fused": True},
        "skip_nonfinite": {"skip_nonfinite": True},
        "raises": {"max_grad_norm": 1.0, "error_if_nonfinite": True},
        "asks for states": {},
    }.items(),
)
@each_class
def test_a_step_that_is_not_made_leaves_the_numbers(name, kind, options):
    optimizer, params = stepped(name, **options)
    before, held = numbers(optimizer), values(params)
    not_made(kind, optimizer, params)
    assert numbers(optimizer) == before and all(map(torch.equal, values(params), held))
    assert optimizer.last_step_skipped is (kind in ("found_inf", "skip_nonfinite"))
    optimizer.found_inf = optimizer.grad_scale = None
    optimizer.param_groups[0]["lr"] = 0.1
    step(optimizer, params)
    assert numbers(optimizer)[0]["k"] == before[0]["k"] + 1


def test_a_grad_scaler_leaves_out_what_overflows():
    runs = []
    for scaled in (True, False):
        optimizer, params = stepped("AdamWScheduleFree", fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, enabled=scaled)
        for now in range(4):
            overflows = now == 1
            if overflows and not scaled:
                continue
            torch.manual_seed(now)
            for p in params:
                p.grad = None
            loss = sum((p * torch.randn_like(p)).sum() for p in params) * (math.inf if overflows else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        runs.append(numbers(optimizer) + values(params))
    assert runs[0][0] == runs[1][0]
    for a, b in zip(runs[0][1:], runs[1][1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


CURVE = cosine(until=8)
SCHEDULERS = {
    "ours": lambda optimizer: trainopt.Schedule(optimizer, lr=CURVE),
    "torch's": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, CURVE),
}


@pytest.mark.parametrize("scheduler_of", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedules_drive_it(scheduler_of):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = trainopt.AdamWScheduleFree([p], lr=0.1, warmup_steps=2)
    optimizer.train()
    scheduler, rates = scheduler_of(optimizer), []
    for _ in range(5):
        step(optimizer, [p])
        scheduler.step()
        rates.append(optimizer.param_groups[0]["scheduled_lr"])
    assert rates == pytest.approx([0.1 * CURVE(k) * min(1, (k + 1) / 2) for k in range(5)])


@each_class
def test_a_compiled_step_runs_as_it_is(name):
    (plain, params), (compiled, others) = stepped(name), stepped(name)
    step(plain, params, 3, seed=2)
    step(compiled, others, 3, seed=2, make=torch.compile(compiled.step, backend="eager"))
    assert_same_values(snapshot(plain), snapshot(compiled))
    assert compiled.completed_steps == 6


# How z is stored ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "options", "found"),
    [
        (torch.float32, {"state_dtype": "8bit"}, (torch.float32, torch.uint8)),
        (torch.float32, {"state_dtype": "bfloat16"}, (torch.float32, torch.bfloat16)),
        (torch.float32, {"state_dtype": {"exp_avg_sq": "8bit"}}, (torch.float32, torch.uint8)),
        (torch.bfloat16, {}, (torch.bfloat16, torch.bfloat16)),
        (torch.bfloat16, {"state_dtype": torch.float16}, (torch.float32, torch.float16)),
        (torch.bfloat16, {"precision": "master"}, (torch.float32, torch.bfloat16)),
        (torch.bfloat16, {"precision": "stochastic"}, (torch.float32, torch.bfloat16)),
    ],
    ids=str,
)
def test_z_is_stored_as_a_weight(dtype, options, found):
    optimizer, (p,) = stepped("AdamWScheduleFree", dtype, shapes=((5000,),), **options)
    assert (optimizer.state[p]["z"].dtype, optimizer.state[p]["exp_avg_sq"].dtype) == found


def test_small_steps_are_not_lost():
    """2,000 steps of a 256th of what a bfloat16 near 1 can tell apart."""
    ends = {}
    for precision in ("native", "master", "master24"):
        p = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
        optimizer = trainopt.SGDScheduleFree([p], lr=2.0**-16, precision=precision)
        optimizer.train()
        for _ in range(2000):
            p.grad = torch.ones_like(p)
            optimizer.step()
        optimizer.eval()
        ends[precision] = p.detach().float().mean().item()
    exact = 1 - 2.0**-16 * 1000.5  # the mean of all z
    assert ends["native"] == 1 and abs(ends["master"] - exact) < 4e-3 and abs(ends["master24"] - exact) < 4e-3


def test_states_are_converted():
    optimizer, (p,) = stepped("AdamWScheduleFree", torch.bfloat16, shapes=((5000,),))
    for choice, precision, found in [
        ("8bit", "master", (torch.float32, torch.uint8)),
        (None, "stochastic", (torch.float32, torch.bfloat16)),
        (None, "native", (torch.bfloat16, torch.bfloat16)),
    ]:
        trainopt.convert_state(optimizer, choice, precision=precision)
        step(optimizer, [p])
        assert (optimizer.state[p]["z"].dtype, optimizer.state[p]["exp_avg_sq"].dtype) == found


# What is refused ------------------------------------------------------------------------------------------------------


REFUSED = [
    ("AdamWScheduleFree", {"betas": (0.0, 0.9)}, ValueError, r"Invalid betas: \(0\.0, 0\.9\)"),
    ("AdamWScheduleFree", {"betas": (1.0, 0.9)}, ValueError, "beta parameter at index 0"),
    ("AdamWScheduleFree", {"betas": (0.9, 1.0)}, ValueError, "beta parameter at index 1"),
    ("AdamWScheduleFree", {"warmup_steps": -1}, ValueError, "Invalid warmup_steps value: -1"),
    ("AdamWScheduleFree", {"silent_sgd_phase": False}, TypeError, "unexpected keyword argument 'silent_sgd_phase'"),
    ("AdamWScheduleFree", {"momentum": 0.5}, TypeError, "unexpected keyword argument 'momentum'"),
    ("RAdamScheduleFree", {"warmup_steps": 1}, TypeError, "unexpected keyword argument 'warmup_steps'"),
    ("RAdamScheduleFree", {"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
    ("SGDScheduleFree", {"momentum": 0.0}, ValueError, "Invalid momentum: 0.0"),
    ("SGDScheduleFree", {"momentum": 1.0}, ValueError, "Invalid momentum: 1.0"),
    ("SGDScheduleFree", {"state_dtype": {"z": "8bit"}}, ValueError, "Invalid state_dtype of 'z': '8bit'"),
    ("SGDScheduleFree", {"state_dtype": {"z": torch.bfloat16}}, ValueError, "Invalid state_dtype of 'z'"),
    ("SGDScheduleFree", {"cautious_weight_decay": True}, ValueError, "cautious_weight_decay=True is for"),
]


@pytest.mark.parametrize(
    ("name", "options", "error", "words"), REFUSED, ids=[f"{name}, {options}" for name, options, *_ in REFUSED]
)
def test_what_makes_no_sense(name, options, error, words):
    p = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(error, match=words):
        getattr(trainopt, name)([p], **options)
    if error is ValueError and "lr" not in options and "betas" not in options:
        optimizer = getattr(trainopt, name)([p])
        with pytest.raises(error, match=words):
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], **options})
        assert len(optimizer.param_groups) == 1


def test_a_rate_without_a_weight_is_an_error_before_anything_changes():
    optimizer, params = stepped("SGDScheduleFree")
    optimizer.param_groups[0].update(lr=0.0, lr_max=0.0, weight_lr_power=-1.0)
    before = snapshot(optimizer)
    assert error_of(lambda: step(optimizer, params))[0] is ValueError
    assert_same_bits(before, snapshot(optimizer))
