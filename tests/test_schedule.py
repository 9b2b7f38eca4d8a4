"""Schedule: the same value after k steps by every path, on any optimizer."""

import copy
import json
import pickle
import warnings

import pytest
import torch
from helpers import through_a_file
from scheduled import (
    CURVE,
    OPTIMIZERS,
    STEPS,
    each_optimizer,
    options_of,
    parameters,
    run,
    schedule_of,
    scheduled,
    two_groups,
)

import trainopt
from trainopt import Schedule
from trainopt.schedules import constant, cosine, linear, warmup
from trainopt.training import Silent, fit


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
    run(first, saved, 4)
    override = {"lr": 0.5, "weight_decay": [0.3, 0.0]}
    saved = [first.state_dict(), saved.state_dict()]
    second, schedule = resumed(make, order, saved, lambda o: Schedule(o, lr=CURVE, override=override))
    seen = run(second, schedule, STEPS - 4)
    assert seen == [[(0.5 * CURVE(k), 0.3), (0.5 * CURVE(k), 0.0)] for k in range(4, STEPS)]


def test_the_curve_itself_may_change_on_resume():
    first = two_groups(torch.optim.SGD)
    run(first, saved := schedule_of(first), 4)
    second = two_groups(torch.optim.SGD)
    longer = Schedule(second, lr=cosine(100))
    longer.load_state_dict(saved.state_dict())
    assert options_of(second, "lr")[0] == (0.1 * cosine(100)(4),)


def test_a_pretrained_optimizer_gives_its_rate_as_the_base_in_either_order():
    saved = two_groups(torch.optim.SGD).state_dict()
    for is_first in (True, False):
        optimizer = torch.optim.SGD([{"params": [p]} for p in parameters()], lr=7.0)
        schedule = Schedule(optimizer, lr=CURVE) if is_first else None
        optimizer.load_state_dict(saved)
        schedule = schedule or Schedule(optimizer, lr=CURVE)
        assert options_of(optimizer, "lr") == [(0.1 * CURVE(0),), (0.01 * CURVE(0),)]
        assert schedule.base_lrs == [0.1, 0.01]


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
