"""Schedule: any option of a group, tensors, other schedulers and tools beside it, and what it refuses."""

import copy
import warnings

import pytest
import torch
from scheduled import (
    CURVE,
    STEPS,
    each_adamw,
    each_optimizer,
    options_of,
    parameters,
    run,
    scheduled,
    two_groups,
)

import trainopt
from trainopt import Schedule
from trainopt.schedules import constant, cosine, linear

# Tensors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [trainopt.AdamW, torch.optim.AdamW, trainopt.SGD], ids=["AdamW", "torch AdamW", "SGD"])
def test_a_tensor_stays_the_same_tensor(make, dtype):
    lr = torch.tensor(0.5, dtype=dtype)
    options = {} if make is trainopt.SGD else {"foreach": False}
    optimizer = make(parameters(), lr=lr, **options)
    plain = make(parameters(), lr=0.5)
    schedule, plain_schedule = Schedule(optimizer, lr=CURVE), Schedule(plain, lr=CURVE)
    group = optimizer.param_groups[0]
    held = group["lr"]
    for k in range(STEPS):
        assert group["lr"] is held and held.dtype == dtype and held.shape == ()
        assert held == torch.tensor(0.5 * CURVE(k), dtype=dtype)
        assert type(group["initial_lr"]) is float
        [last] = schedule.get_last_lr()
        last.fill_(99)
        schedule.base_lrs[0] = 99
        assert float(held) == pytest.approx(plain.param_groups[0]["lr"], rel=1e-6)
        for o, s in ((optimizer, schedule), (plain, plain_schedule)):
            o.step()
            s.step()


def test_tensors_inside_betas_are_filled_too():
    betas = (torch.tensor(0.9), torch.tensor(0.99))
    optimizer = torch.optim.Adam(parameters(), lr=torch.tensor(0.1), betas=betas, capturable=True, foreach=False)
    Schedule(optimizer, beta1=constant(0.5), beta2=constant(0.1))
    group = optimizer.param_groups[0]
    assert group["betas"][0] is betas[0] and group["betas"][1] is betas[1]
    assert [float(beta) for beta in betas] == pytest.approx([0.45, 0.099])


# Every option ---------------------------------------------------------------------------------------------------------


FALL = linear(10)
DRIVEN = ("momentum", "weight_decay", "l1", "noise")


def two_scales(make):
    first, second = parameters()
    return make([{"params": [first], "lr_scale": 0.5}, {"params": [second]}], lr=0.1)


#: An optimizer, what drives its options, and what those are in the k-th update, group by group.
FOLLOWED = {
    "options of the engine": (
        lambda: trainopt.SGD(parameters(), lr=0.1, momentum=0.8, weight_decay=0.4, l1=0.2, noise=0.01),
        dict.fromkeys(DRIVEN, linear(4)),
        ("lr", *DRIVEN),
        lambda k: [(0.1, *(base * linear(4)(k) for base in (0.8, 0.4, 0.2, 0.01)))],
    ),
    "a plain function": (
        lambda: two_groups(torch.optim.SGD),
        {"lr": lambda step: 1 / (1 + step)},
        ("lr",),
        lambda k: [(0.1 * (1 / (1 + k)),), (0.01 * (1 / (1 + k)),)],
    ),
    # As timm's schedulers do.
    **{
        f"lr_scale, {whose}": (
            lambda make=make: two_scales(make),
            {"lr": FALL, "weight_decay": FALL},
            ("lr", "weight_decay"),
            lambda k: [(0.1 * FALL(k) * 0.5, 0.01 * FALL(k)), (0.1 * FALL(k), 0.01 * FALL(k))],
        )
        for whose, make in (("ours", trainopt.AdamW), ("torch's", torch.optim.AdamW))
    },
}


@pytest.mark.parametrize(("make", "curves", "names", "expected"), FOLLOWED.values(), ids=FOLLOWED)
def test_an_option_follows_its_curve(make, curves, names, expected):
    optimizer = make()
    seen = run(optimizer, Schedule(optimizer, **curves), 6, *names)
    assert seen == [expected(k) for k in range(6)]


def test_an_option_of_ours_that_no_group_has_yet():
    optimizer = trainopt.AdamW(parameters())
    assert "noise" not in optimizer.param_groups[0]
    schedule = Schedule(optimizer, noise=FALL, override={"noise": 0.5})
    assert run(optimizer, schedule, 3, "noise") == [[(0.5 * FALL(k),)] for k in range(3)]
    optimizer.load_state_dict(trainopt.AdamW(parameters()).state_dict())
    assert optimizer.param_groups[0]["noise"] == 0.5 * FALL(3)


@pytest.mark.parametrize("make", [trainopt.Adam, torch.optim.Adam, torch.optim.NAdam])
def test_momentum_is_beta1_where_there_are_betas(make):
    optimizer = make(parameters(), betas=(0.8, 0.99))
    schedule = Schedule(optimizer, momentum=linear(4), beta2=constant(0.5))
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["betas"] == (0.8 * 0.75, 0.99 * 0.5)
    assert type(optimizer.param_groups[0]["betas"]) is tuple


# In company -----------------------------------------------------------------------------------------------------------


def test_fuse_keeps_the_schedule_and_its_groups():
    def trained(fuse):
        optimizer, schedule = scheduled(torch.optim.AdamW)
        seen = run(optimizer, schedule, 3)
        optimizer = trainopt.fuse(optimizer) if fuse else optimizer
        seen += run(optimizer, schedule, 3)
        optimizer.add_param_group({"params": parameters(1), "lr": 3.0})
        seen += run(optimizer, schedule, 3)
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.add_param_group({"params": parameters(1), "lr": 5.0})
        return seen + run(optimizer, schedule, 3)

    assert trained(True) == trained(False)


@each_optimizer
def test_torchs_schedulers_may_drive_another_option_of_the_same_optimizer(make):
    optimizer = two_groups(make)
    first = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    ours = Schedule(optimizer, weight_decay=linear(10))
    second = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    base = optimizer.param_groups[0]["weight_decay"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for k in range(5):
            [lr, decay] = options_of(optimizer, "lr", "weight_decay")[0]
            assert lr == pytest.approx(0.1 * 0.9**k * 0.5 ** (k // 2)) and decay == base * linear(10)(k)
            optimizer.step()
            for scheduler in (first, ours, second):
                scheduler.step()


def test_inside_torchs_sequence():
    optimizer = torch.optim.SGD(parameters(), lr=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, total_iters=2),
            Schedule(optimizer, lr=cosine(4)),
        ]
        sequence = torch.optim.lr_scheduler.SequentialLR(optimizer, parts, milestones=[2])
        seen = []
        for _ in range(8):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            sequence.step()
    assert seen == pytest.approx([0.5, 0.75, *(cosine(4)(k) for k in range(6))])


def test_the_caller_may_count():
    optimizer, schedule = scheduled(torch.optim.SGD)
    schedule.step(7)
    assert schedule.last_epoch == 7 and options_of(optimizer, "lr")[0] == (0.1 * CURVE(7),)


@each_adamw
def test_a_compiled_step_is_counted_and_not_compiled_again_for_each_rate(make):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    optimizer = make(parameters(), lr=torch.tensor(0.1), **({"foreach": False} if make is torch.optim.AdamW else {}))
    schedule = Schedule(optimizer, lr=CURVE)
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    for _ in range(12):
        step()
        schedule.step()
    assert schedule.last_epoch == 12
    assert sum(torch._dynamo.utils.counters["recompiles"].values()) <= 1


# Refusals -------------------------------------------------------------------------------------------------------------


REFUSED = {
    "nothing": ({}, ValueError, ["no option"]),
    "no curve": ({"lr": 0.1}, TypeError, ["lr", "0.1"]),
    "an unknown option": ({"learning_rate": cosine(5)}, ValueError, ["'learning_rate'", "it has lr,"]),
    "beta1 of SGD": ({"beta1": cosine(5)}, ValueError, ["'beta1'"]),
    "a switch": ({"nesterov": cosine(5)}, ValueError, ["nesterov", "False"]),
    "a None": ({"foreach": cosine(5)}, ValueError, ["foreach", "None"]),
    "parameters": ({"params": cosine(5)}, ValueError, ["params"]),
    "completed below 0": ({"lr": cosine(5), "completed": -1}, ValueError, ["completed", "-1"]),
    "override below 0": ({"lr": cosine(5), "override": {"lr": -1.0}}, ValueError, ["lr", "-1.0"]),
    "override of one group": (
        {"lr": cosine(5), "override": {"lr": [1.0]}},
        ValueError,
        ["lr", "[1.0]", "2 parameter groups"],
    ),
    "override by a text": ({"lr": cosine(5), "override": {"lr": "fast"}}, ValueError, ["lr", "'fast'"]),
    "override of an unknown option": ({"lr": cosine(5), "override": {"gain": 1.0}}, ValueError, ["'gain'"]),
}


@pytest.mark.parametrize(("arguments", "error", "words"), REFUSED.values(), ids=REFUSED)
def test_refused_before_anything_is_changed(arguments, error, words):
    optimizer = two_groups(torch.optim.SGD)
    before = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(error) as refusal:
        Schedule(optimizer, **arguments)
    assert all(word in str(refusal.value) for word in words), refusal.value
    assert optimizer.param_groups == before
    assert "step" not in optimizer.__dict__ and "add_param_group" not in optimizer.__dict__


def test_only_an_optimizer_is_scheduled():
    with pytest.raises(TypeError, match="str is not an Optimizer"):
        Schedule("SGD", lr=cosine(5))


def test_a_factor_that_is_not_finite_is_refused():
    optimizer = two_groups(torch.optim.SGD)
    schedule = Schedule(optimizer, lr=lambda step: float("nan") if step else 1.0)
    optimizer.step()
    with pytest.raises(ValueError, match="factor of lr after 1 steps is nan"):
        schedule.step()


BETAS = {
    "beta2 of 1": ({"beta2": lambda k: 1 + k / 999}, ["beta2", "1.0"]),
    "beta1 above 1": ({"beta1": lambda k: 1 + k}, ["beta1", "1.8"]),
    "momentum is beta1": ({"momentum": lambda k: 1 + k}, ["momentum", "1.8"]),
    "below 0": ({"beta1": lambda k: 1 - 2 * k}, ["beta1", "-0.9"]),
    "a negative rate": ({"lr": lambda k: 1 - 2 * k}, ["lr", "-0.1"]),
    "a negative decay": ({"weight_decay": lambda k: 1 - 2 * k}, ["weight_decay", "-0.5"]),
}


@pytest.mark.parametrize("factors, words", BETAS.values(), ids=BETAS)
@each_adamw
@pytest.mark.parametrize("tensors", [False, True])
def test_a_value_that_the_option_cannot_have_is_refused(factors, words, make, tensors):
    betas = (0.9, 0.999)
    if tensors and make is trainopt.AdamW:
        betas = tuple(torch.tensor(beta, dtype=torch.float64) for beta in betas)
    optimizer = make(parameters(), lr=0.1, betas=betas, weight_decay=0.5)
    schedule = Schedule(optimizer, eps=constant(), **factors)
    options = optimizer.param_groups[0]
    before = copy.deepcopy({**options, "params": None})
    optimizer.step()
    with pytest.raises(ValueError, match="after 1 steps would be") as refusal:
        schedule.step()
    assert all(word in str(refusal.value) for word in words), refusal.value
    assert {**options, "params": None} == before
    assert schedule.last_epoch == 0

    fresh = make(parameters(), lr=0.1, betas=betas, weight_decay=0.5)
    groups = [dict(group) for group in fresh.param_groups]
    with pytest.raises(ValueError, match="after 1 steps would be"):
        Schedule(fresh, completed=1, **factors)
    assert fresh.param_groups == groups and "_schedule_watch" not in fresh.__dict__
    with pytest.raises(ValueError, match="after 1 steps would be"):
        schedule.load_state_dict({**schedule.state_dict(), "last_epoch": 1})
    assert schedule.last_epoch == 0


def test_a_beta_that_its_tensor_would_round_to_1_is_refused():
    optimizer = trainopt.Adam(parameters(), betas=(torch.tensor(0.9), torch.tensor(0.5)))
    with pytest.raises(ValueError, match="beta2"):
        Schedule(optimizer, beta2=constant(2 * (1 - 1e-9)))
    Schedule(trainopt.Adam(parameters(), betas=(0.9, 0.5)), beta2=constant(2 * (1 - 1e-9)))


def test_sgds_momentum_may_be_1():
    optimizer = trainopt.SGD(parameters(), momentum=0.5)
    Schedule(optimizer, momentum=constant(2.0))
    assert optimizer.param_groups[0]["momentum"] == 1.0


STATES = {
    "no bases": ({"last_epoch": 3}, "'bases'"),
    "a count below 0": ({"last_epoch": -3, "bases": {}}, "-3"),
    "one group": ({"last_epoch": 3, "bases": {"lr": [0.1]}}, "2 parameter groups"),
    "a text": ({"last_epoch": 3, "bases": {"lr": [0.1, "x"]}}, "'x'"),
}


@pytest.mark.parametrize(("state", "words"), STATES.values(), ids=STATES)
def test_a_state_of_something_else_is_refused_whole(state, words):
    optimizer, schedule = scheduled(torch.optim.SGD)
    before = schedule.state_dict(), options_of(optimizer, "lr", "weight_decay")
    with pytest.raises(ValueError) as refusal:
        schedule.load_state_dict(state)
    assert words in str(refusal.value)
    assert (schedule.state_dict(), options_of(optimizer, "lr", "weight_decay")) == before
