"""Schedule: the same value after k steps by every path, on any optimizer, for any option."""

import copy
import io
import json
import pickle
import warnings

import pytest
import torch

import trainopt
from trainopt import Schedule
from trainopt.schedules import constant, cosine, linear, warmup
from trainopt.training import Silent, fit

CURVE = warmup(3, start=0.25).then(cosine(12, floor=0.1))
STEPS = 16

OPTIMIZERS = {
    "trainopt.SGD": lambda params, **o: trainopt.SGD(params, momentum=0.5, **o),
    "trainopt.AdamW": trainopt.AdamW,
    "SGD": lambda params, **o: torch.optim.SGD(params, momentum=0.5, **o),
    "AdamW": torch.optim.AdamW,
    "AdamW fused": lambda params, **o: torch.optim.AdamW(params, fused=True, **o),
    "RMSprop": torch.optim.RMSprop,
    "Adagrad": torch.optim.Adagrad,
    "NAdam": torch.optim.NAdam,
}
each_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def parameters(count=2):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(5, generator=generator)) for _ in range(count)]
    for param in params:
        param.grad = torch.ones(5)
    return params


def two_groups(make, **options):
    first, second = parameters()
    return make([{"params": [first], "lr": 0.1, "weight_decay": 0.2}, {"params": [second], "lr": 0.01}], **options)


def options_of(optimizer, *names):
    return [tuple(float(group[name]) for name in names) for group in optimizer.param_groups]


def schedule_of(optimizer, **more):
    return Schedule(optimizer, lr=CURVE, weight_decay=linear(10), **more)


def scheduled(make, **options):
    optimizer = two_groups(make, **options)
    return optimizer, schedule_of(optimizer)


def run(optimizer, schedule, steps):
    """(lr, weight_decay) of every group in each update."""
    seen = []
    for _ in range(steps):
        seen.append(options_of(optimizer, "lr", "weight_decay"))
        optimizer.step()
        schedule.step()
    return seen


@each_optimizer
def test_every_update_is_made_with_the_curves_value(make):
    optimizer = two_groups(make)
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    schedule = schedule_of(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seen = run(optimizer, schedule, STEPS)
    fall = linear(10)
    for k in range(STEPS):
        assert seen[k] == [(0.1 * CURVE(k), decays[0] * fall(k)), (0.01 * CURVE(k), decays[1] * fall(k))]
    assert schedule.last_epoch == STEPS
    assert schedule.get_last_lr() == [0.1 * CURVE(STEPS), 0.01 * CURVE(STEPS)] == schedule.get_lr()
    assert schedule.base_lrs == [0.1, 0.01]


def test_it_is_a_scheduler_of_torchs():
    schedule = schedule_of(two_groups(torch.optim.SGD))
    assert isinstance(schedule, torch.optim.lr_scheduler.LRScheduler)
    assert trainopt.Schedule is Schedule


# The same by every path ----------------------------------------------------------------------------------------------


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


each_order = pytest.mark.parametrize(
    "order", ["optimizer, schedule", "schedule, optimizer", "loaded before it is made", "no optimizer"]
)


def resumed(make, order, saved, schedule_of):
    """An optimizer and its schedule, with what was saved of both loaded in this order."""
    of_optimizer, of_schedule = through_a_file(saved)
    optimizer = two_groups(make)
    if order == "loaded before it is made":
        optimizer.load_state_dict(of_optimizer)
    schedule = schedule_of(optimizer)
    if order == "optimizer, schedule":
        optimizer.load_state_dict(of_optimizer)
    schedule.load_state_dict(of_schedule)
    if order == "schedule, optimizer":
        optimizer.load_state_dict(of_optimizer)
    return optimizer, schedule


@each_optimizer
@each_order
def test_resumed_at_any_step_it_goes_on_the_same(make, order):
    optimizer = two_groups(make)
    straight = run(optimizer, schedule_of(optimizer), STEPS)
    first = two_groups(make)
    saved_schedule = schedule_of(first)
    for k in range(STEPS):
        second, schedule = resumed(make, order, [first.state_dict(), saved_schedule.state_dict()], schedule_of)
        assert schedule.last_epoch == k
        assert run(second, schedule, STEPS - k) == straight[k:]
        run(first, saved_schedule, 1)


@each_optimizer
def test_without_a_saved_schedule_the_step_can_be_given(make):
    optimizer = two_groups(make)
    straight = run(optimizer, schedule_of(optimizer), STEPS)
    first = two_groups(make)
    run(first, schedule_of(first), 5)
    second = two_groups(make)
    second.load_state_dict(first.state_dict())
    assert run(second, schedule_of(second, completed=5), STEPS - 5) == straight[5:]


COUNTING = ("trainopt.AdamW", "AdamW", "AdamW fused", "RMSprop", "Adagrad", "NAdam")


def heard_of(act):
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        act()
    return [str(each.message) for each in heard if "Schedule:" in str(each.message)]


@pytest.mark.parametrize("name", COUNTING)
@pytest.mark.parametrize("order", ["optimizer first", "schedule first"])
def test_restored_without_its_own_state_it_says_so_once(name, order):
    first = two_groups(OPTIMIZERS[name])
    run(first, schedule_of(first), 5)

    def resume(**more):
        second = two_groups(OPTIMIZERS[name])
        if order == "optimizer first":
            second.load_state_dict(first.state_dict())
        schedule = schedule_of(second, **more)
        if order == "schedule first":
            second.load_state_dict(first.state_dict())
        run(second, schedule, 3)

    (text,) = heard_of(resume)
    assert "has made 6 steps and this schedule has counted 1" in text and "completed=5" in text
    assert not heard_of(lambda: resume(completed=5)) and not heard_of(lambda: resume(completed=0))


@each_optimizer
def test_what_is_not_behind_says_nothing(make):
    def straight(**more):
        optimizer = two_groups(make)
        run(optimizer, schedule_of(optimizer, **more), 4)
        return optimizer

    def restored(order):
        saved, second = straight(), two_groups(make)
        schedule = schedule_of(second)
        for part in order:
            if part == "optimizer":
                second.load_state_dict(saved.state_dict())
            else:
                schedule.load_state_dict({"last_epoch": 4, "bases": {"lr": [0.1, 0.01], "weight_decay": [0.2, 0.0]}})
        run(second, schedule, 2)

    def constant_only():
        second = two_groups(make)
        second.load_state_dict(straight().state_dict())
        run(second, Schedule(second, override={"lr": 0.5}), 2)

    def once_an_epoch():
        optimizer, schedule = scheduled(make)
        for _ in range(5):
            optimizer.step()
        schedule.step()

    assert not heard_of(straight) and not heard_of(constant_only) and not heard_of(once_an_epoch)
    for order in (("optimizer", "schedule"), ("schedule", "optimizer")):
        assert not heard_of(lambda order=order: restored(order))


def test_the_state_is_plain_numbers():
    schedule = schedule_of(two_groups(torch.optim.SGD, momentum=torch.tensor(0.5)))
    state = schedule.state_dict()
    assert state == {"last_epoch": 0, "bases": {"lr": [0.1, 0.01], "weight_decay": [0.2, 0.0]}}
    assert json.loads(json.dumps(state)) == state


def test_a_step_that_is_not_scheduled_yet_is_in_the_state():
    optimizer, schedule = scheduled(torch.optim.SGD)
    run(optimizer, schedule, 2)
    optimizer.step()
    assert schedule.state_dict()["last_epoch"] == 3
    schedule.step()
    assert schedule.state_dict()["last_epoch"] == 3 == schedule.last_epoch


@each_optimizer
def test_the_unit_is_one_optimizer_step_however_often_step_is_called(make):
    optimizer, schedule = scheduled(make)
    schedule.step()
    assert options_of(optimizer, "lr")[0] == (0.1 * CURVE(0),)
    for _ in range(4):
        optimizer.step()
    schedule.step()
    schedule.step()
    assert schedule.last_epoch == 4
    assert options_of(optimizer, "lr")[0] == (0.1 * CURVE(4),)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_rate_of_an_update_does_not_depend_on_the_micro_batches_in_it(accumulation):
    updates = 12
    curve = warmup(3, start=0.25).then(cosine(updates - 1, floor=0.1))
    model = torch.nn.Linear(2, 1)
    optimizer = trainopt.SGD(model.parameters(), lr=0.1)
    used = []
    optimizer.register_step_pre_hook(lambda *_: used.append(optimizer.param_groups[0]["lr"]))
    data = torch.randn(48 * accumulation, 2), torch.randn(48 * accumulation, 1)
    fit(
        model,
        data,
        torch.nn.functional.mse_loss,
        optimizer,
        schedule=Schedule(optimizer, lr=curve),
        report=Silent(),
        steps=updates,
        batch_size=4,
        accumulation=accumulation,
    )
    assert used == [0.1 * curve(k) for k in range(updates)]
    assert used[-1] == pytest.approx(0.01) and min(used[:-1]) > used[-1]


def test_a_schedule_counts_from_when_it_was_made():
    optimizer = two_groups(trainopt.SGD)
    for _ in range(3):
        optimizer.step()
    schedule = schedule_of(optimizer)
    assert schedule.last_epoch == 0
    other = Schedule(optimizer, momentum=constant())
    run(optimizer, schedule, 2)
    other.step()
    assert schedule.last_epoch == 2 == other.last_epoch


@each_optimizer
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
def test_copies_go_on_by_themselves(make, duplicate):
    optimizer, schedule = scheduled(make)
    run(optimizer, schedule, 3)
    optimizer.step()  # not scheduled yet
    other_optimizer, other = duplicate((optimizer, schedule))
    assert other.optimizer is other_optimizer is not optimizer
    for p in (p for group in other_optimizer.param_groups for p in group["params"]):
        p.grad = torch.ones_like(p)
    schedule.step()
    other.step()
    assert run(other_optimizer, other, 5) == run(optimizer, schedule, 5)
    assert other.last_epoch == 9 == schedule.last_epoch


def test_a_schedule_that_is_gone_sets_nothing():
    optimizer, schedule = scheduled(torch.optim.SGD)
    state = optimizer.state_dict()
    del schedule
    state["param_groups"][0]["lr"] = 5.0
    optimizer.load_state_dict(state)
    assert options_of(optimizer, "lr")[0] == (5.0,)


# New values for a resumed run -----------------------------------------------------------------------------------------


@each_optimizer
@each_order
def test_override_wins_over_what_is_loaded(make, order):
    first = two_groups(make)
    saved = Schedule(first, lr=CURVE)
    for _ in range(4):
        first.step()
        saved.step()
    override = {"lr": 0.5, "weight_decay": [0.3, 0.0]}
    saved = [first.state_dict(), saved.state_dict()]
    second, schedule = resumed(make, order, saved, lambda o: Schedule(o, lr=CURVE, override=override))
    for k in range(4, STEPS):
        assert options_of(second, "lr", "weight_decay") == [(0.5 * CURVE(k), 0.3), (0.5 * CURVE(k), 0.0)]
        second.step()
        schedule.step()


def test_the_curve_itself_may_change_on_resume():
    first = two_groups(torch.optim.SGD)
    run(first, saved := schedule_of(first), 4)
    second = two_groups(torch.optim.SGD)
    longer = Schedule(second, lr=cosine(100))
    longer.load_state_dict(saved.state_dict())
    assert options_of(second, "lr")[0] == (0.1 * cosine(100)(4),)


def test_a_pretrained_optimizer_gives_its_rate_as_the_base_in_either_order():
    saved = two_groups(torch.optim.SGD).state_dict()
    for schedule_first in (True, False):
        optimizer = torch.optim.SGD([{"params": [p]} for p in parameters()], lr=7.0)
        if schedule_first:
            schedule = Schedule(optimizer, lr=CURVE)
            optimizer.load_state_dict(saved)
        else:
            optimizer.load_state_dict(saved)
            schedule = Schedule(optimizer, lr=CURVE)
        assert options_of(optimizer, "lr") == [(0.1 * CURVE(0),), (0.01 * CURVE(0),)]
        assert schedule.base_lrs == [0.1, 0.01]


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


def test_any_option_of_a_group_is_driven():
    optimizer = trainopt.SGD(parameters(), lr=0.1, momentum=0.8, weight_decay=0.4, l1=0.2, noise=0.01)
    schedule = Schedule(optimizer, momentum=linear(4), weight_decay=linear(4), l1=linear(4), noise=linear(4))
    for k in range(6):
        assert options_of(optimizer, "lr", "momentum", "weight_decay", "l1", "noise") == [
            (0.1, 0.8 * linear(4)(k), 0.4 * linear(4)(k), 0.2 * linear(4)(k), 0.01 * linear(4)(k))
        ]
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("make", [trainopt.Adam, torch.optim.Adam, torch.optim.NAdam])
def test_momentum_is_beta1_where_there_are_betas(make):
    optimizer = make(parameters(), betas=(0.8, 0.99))
    schedule = Schedule(optimizer, momentum=linear(4), beta2=constant(0.5))
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["betas"] == (0.8 * 0.75, 0.99 * 0.5)
    assert type(optimizer.param_groups[0]["betas"]) is tuple


def test_a_plain_function_is_a_curve_too():
    optimizer = two_groups(torch.optim.SGD)
    schedule = Schedule(optimizer, lr=lambda step: 1 / (1 + step))
    optimizer.step()
    schedule.step()
    assert options_of(optimizer, "lr") == [(0.05,), (0.005,)]


# Skipped steps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [trainopt.SGD, trainopt.AdamW, torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("unscale_first", [False, True])
def test_a_step_skipped_for_overflow_does_not_count(make, fused, unscale_first):
    optimizer = make(parameters(), lr=0.1, fused=fused)
    schedule = Schedule(optimizer, lr=CURVE)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    done = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for overflows in (True, False, True, True, False, False):
            assert float(optimizer.param_groups[0]["lr"]) == 0.1 * CURVE(done)
            for p in optimizer.param_groups[0]["params"]:
                p.grad = scaler.scale(torch.full((5,), torch.inf if overflows else 1.0))
            if unscale_first:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            done += not overflows
            assert schedule.last_epoch == done


@each_optimizer
def test_a_step_that_fails_does_not_count(make):
    optimizer, schedule = scheduled(make)

    def fails():
        raise RuntimeError("in the closure")

    with pytest.raises(RuntimeError, match="in the closure"):
        optimizer.step(fails)
    schedule.step()
    assert schedule.last_epoch == 0


def test_steps_of_the_reference_path_count(monkeypatch):
    monkeypatch.setattr("trainopt.switches.REFERENCE_FORCED", True)
    optimizer = two_groups(trainopt.AdamW)
    assert len(run(optimizer, schedule := schedule_of(optimizer), 3)) == 3 == schedule.last_epoch


def test_steps_with_hooks_and_closures_count():
    optimizer = two_groups(trainopt.SGD)
    optimizer.register_step_post_hook(lambda *_: None)
    schedule = schedule_of(optimizer)
    optimizer.step(lambda: 1.0)
    schedule.step()
    assert schedule.last_epoch == 1


# Groups that come later -----------------------------------------------------------------------------------------------


@each_optimizer
def test_a_group_added_later_is_scheduled_from_its_own_base(make):
    optimizer, schedule = scheduled(make)
    straight = run(optimizer, schedule, 5)
    [param] = parameters(1)
    optimizer.add_param_group({"params": [param], "lr": 3.0, "weight_decay": 0.5})
    straight += run(optimizer, schedule, STEPS - 5)
    for k in range(5, STEPS):
        assert straight[k][2] == (3.0 * CURVE(k), 0.5 * linear(10)(k))
        assert straight[k][0][0] == 0.1 * CURVE(k)

    of_optimizer, of_schedule = optimizer.state_dict(), schedule.state_dict()
    resumed_optimizer = two_groups(make)
    resumed = schedule_of(resumed_optimizer)
    resumed_optimizer.add_param_group({"params": parameters(1)})
    resumed_optimizer.load_state_dict(of_optimizer)
    resumed.load_state_dict(of_schedule)
    assert resumed.state_dict() == of_schedule
    assert run(resumed_optimizer, resumed, 3) == run(optimizer, schedule, 3)


def test_a_group_put_into_the_list_by_hand_is_scheduled_from_the_next_step_on():
    optimizer, schedule = scheduled(torch.optim.SGD)
    optimizer.param_groups.append({**optimizer.param_groups[1], "params": parameters(1), "lr": 3.0})
    del optimizer.param_groups[2]["initial_lr"]
    run(optimizer, schedule, 1)
    assert optimizer.param_groups[2]["lr"] == 3.0 * CURVE(1)


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


@pytest.mark.parametrize("make", [trainopt.AdamW, torch.optim.AdamW], ids=["ours", "torch's"])
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


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({}, ValueError, ["no option"]),
        ({"lr": 0.1}, TypeError, ["lr", "0.1"]),
        ({"learning_rate": cosine(5)}, ValueError, ["'learning_rate'", "it has lr,"]),
        ({"beta1": cosine(5)}, ValueError, ["'beta1'"]),
        ({"nesterov": cosine(5)}, ValueError, ["nesterov", "False"]),
        ({"foreach": cosine(5)}, ValueError, ["foreach", "None"]),
        ({"params": cosine(5)}, ValueError, ["params"]),
        ({"lr": cosine(5), "completed": -1}, ValueError, ["completed", "-1"]),
        ({"lr": cosine(5), "override": {"lr": -1.0}}, ValueError, ["lr", "-1.0"]),
        ({"lr": cosine(5), "override": {"lr": [1.0]}}, ValueError, ["lr", "[1.0]", "2 parameter groups"]),
        ({"lr": cosine(5), "override": {"lr": "fast"}}, ValueError, ["lr", "'fast'"]),
        ({"lr": cosine(5), "override": {"gain": 1.0}}, ValueError, ["'gain'"]),
    ],
)
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
@pytest.mark.parametrize("make", [trainopt.AdamW, torch.optim.AdamW], ids=["ours", "torch's"])
@pytest.mark.parametrize("tensors", [False, True])
def test_a_value_that_the_option_cannot_have_is_refused(factors, words, make, tensors):
    betas = (0.9, 0.999)
    if tensors and make is trainopt.AdamW:
        betas = tuple(torch.tensor(beta, dtype=torch.float64) for beta in betas)
    optimizer = make(parameters(), lr=0.1, betas=betas, weight_decay=0.5)
    schedule = Schedule(optimizer, eps=constant(), **factors)
    before = copy.deepcopy({k: v for k, v in optimizer.param_groups[0].items() if k != "params"})
    optimizer.step()
    with pytest.raises(ValueError, match="after 1 steps would be") as refusal:
        schedule.step()
    assert all(word in str(refusal.value) for word in words), refusal.value
    assert {k: v for k, v in optimizer.param_groups[0].items() if k != "params"} == before
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


def test_an_option_of_ours_that_no_group_has_yet():
    optimizer = trainopt.AdamW(parameters())
    assert "noise" not in optimizer.param_groups[0]
    schedule = Schedule(optimizer, noise=linear(10), override={"noise": 0.5})
    for k in range(3):
        assert optimizer.param_groups[0]["noise"] == 0.5 * linear(10)(k)
        optimizer.step()
        schedule.step()
    optimizer.load_state_dict(trainopt.AdamW(parameters()).state_dict())
    assert optimizer.param_groups[0]["noise"] == 0.5 * linear(10)(3)


@pytest.mark.parametrize("make", [trainopt.AdamW, torch.optim.AdamW], ids=["ours", "torch's"])
def test_a_groups_lr_scale_is_applied_as_timms_schedulers_do(make):
    first, second = parameters()
    optimizer = make([{"params": [first], "lr_scale": 0.5}, {"params": [second]}], lr=0.1)
    schedule = Schedule(optimizer, lr=linear(10), weight_decay=linear(10))
    for k in range(3):
        assert options_of(optimizer, "lr", "weight_decay") == [
            (0.1 * linear(10)(k) * 0.5, 0.01 * linear(10)(k)),
            (0.1 * linear(10)(k), 0.01 * linear(10)(k)),
        ]
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(
    "state, words",
    [
        ({"last_epoch": 3}, "'bases'"),
        ({"last_epoch": -3, "bases": {}}, "-3"),
        ({"last_epoch": 3, "bases": {"lr": [0.1]}}, "2 parameter groups"),
        ({"last_epoch": 3, "bases": {"lr": [0.1, "x"]}}, "'x'"),
    ],
)
def test_a_state_of_something_else_is_refused_whole(state, words):
    optimizer, schedule = scheduled(torch.optim.SGD)
    before = schedule.state_dict(), options_of(optimizer, "lr", "weight_decay")
    with pytest.raises(ValueError) as refusal:
        schedule.load_state_dict(state)
    assert words in str(refusal.value)
    assert (schedule.state_dict(), options_of(optimizer, "lr", "weight_decay")) == before
