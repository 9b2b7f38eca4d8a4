"""trainopt.fuse: torch's optimizers that are made trainopt's in the middle of a run."""

import copy
import pickle
import warnings

import pytest
import torch
from helpers import (
    CLASSES,
    OPTIONS,
    TABLE,
    WITH_FUSED,
    assert_same_outcome,
    each_class,
    model_and,
    skip_where_torchs_differ,
    skip_without_fused,
    skip_without_momentum,
    train,
)

import trainopt


@each_class
@pytest.mark.parametrize("flags", [{}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("before", [0, 3])
def test_fuse_carries_on(name, flags, before):
    skip_without_fused(name, flags)
    if before:
        skip_where_torchs_differ(name, flags)
    model, optimizer = model_and(CLASSES[name][1], **OPTIONS[name], **flags)
    train(model, optimizer, before)
    fused = trainopt.fuse(optimizer)
    assert type(fused) is CLASSES[name][0]
    assert fused.param_groups is optimizer.param_groups and fused.state is optimizer.state
    train(model, fused, 3, start=before)
    straight_model, straight = model_and(CLASSES[name][1], **OPTIONS[name])
    train(straight_model, straight, before + 3)
    assert_same_outcome((fused, list(model.parameters())), (straight, list(straight_model.parameters())))
    assert all(row.path.startswith("fused") for row in trainopt.explain(fused))
    assert fused.state_dict()["state"].keys() == straight.state_dict()["state"].keys()
    # The same groups: what changes them through the old one arrives.
    optimizer.param_groups[0].update(TABLE[name].still)
    train(model, fused, 1)  # ASGD's step size is that of the step before
    values = [p.detach().clone() for p in model.parameters()]
    train(model, fused, 1)
    assert all(torch.equal(p, v) for p, v in zip(model.parameters(), values, strict=True))
    copied = copy.deepcopy(fused)
    assert type(copied) is CLASSES[name][0]
    group = {"params": [torch.nn.Parameter(torch.zeros(3))]}
    fused.add_param_group(group)
    assert "l1: 0.0" in repr(fused) and len(optimizer.param_groups) == 2


def assert_fused_alike(program):
    """A program that makes (optimizer, params) and turns one into trainopt's on the way ends as if it did not."""
    ends = [program(turn) for turn in (trainopt.fuse, lambda optimizer: optimizer)]
    assert_same_outcome(*ends)
    return ends


@each_class
def test_fuse_keeps_hooks(name):
    _, optimizer = model_and(CLASSES[name][1], **OPTIONS[name])
    events = []
    optimizer.register_step_pre_hook(lambda o, a, k: events.append(("pre", type(o))))
    optimizer.register_step_post_hook(lambda o, a, k: events.append(("post", type(o))))
    optimizer.register_state_dict_post_hook(lambda o, d: events.append(("saved", type(o))))
    optimizer.register_load_state_dict_post_hook(lambda o: events.append(("loaded", type(o))))
    fused = trainopt.fuse(optimizer)
    ours = CLASSES[name][0]
    fused.step()
    fused.load_state_dict(fused.state_dict())
    assert events == [("pre", ours), ("post", ours), ("saved", ours), ("loaded", ours)]


@each_class
def test_fuse_keeps_groups_names_and_their_options(name):
    def program(turn):
        p, q = (torch.nn.Parameter(torch.full((3,), value, dtype=torch.float64)) for value in (0.5, -2.0))
        groups = [{"params": [("a", p)], "lr": 0.5}, {"params": [("b", q)], "weight_decay": 0.25, "tag": "mine"}]
        optimizer = turn(CLASSES[name][1](groups, **OPTIONS[name]))
        for i in range(3):
            p.grad, q.grad = torch.full_like(p, i + 1.0), torch.full_like(q, i - 1.0)
            optimizer.step()
        return optimizer, [p, q]

    (fused, _), _ = assert_fused_alike(program)
    assert fused.param_groups[1]["tag"] == "mine" and fused.param_groups[1]["param_names"] == ["b"]


SCHEDULERS = {
    "LinearLR": lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=5),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=8),
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: 0.9**k),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=12),
    "CyclicLR": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3, cycle_momentum=False),
    "ReduceLROnPlateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "Schedule": lambda o: trainopt.Schedule(o, lr=trainopt.schedules.linear(8)),
}


@each_class
@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("load", ["never", "new", "old", "twice"])
@pytest.mark.filterwarnings("error")
def test_a_scheduler_moves_what_fuse_made_also_after_loading(name, kind, load):
    if kind == "OneCycleLR":
        skip_without_momentum(name)
    rates = []

    def program(turn):
        model, old = model_and(CLASSES[name][1], **OPTIONS[name])
        scheduler = SCHEDULERS[kind](old)
        optimizer = turn(old)
        held = optimizer.param_groups
        rates.append([])
        for i in range(6):
            if (i == 2 and load != "never") or (i == 3 and load == "twice"):
                loaded = old if load == "old" else optimizer
                loaded.load_state_dict(copy.deepcopy(loaded.state_dict()))
            train(model, optimizer, 1, start=i)
            scheduler.step(*([1.0] if kind == "ReduceLROnPlateau" else []))
            rates[-1].append(optimizer.param_groups[0]["lr"])
            assert old.param_groups is optimizer.param_groups and old.state is optimizer.state
            assert optimizer is old or optimizer.param_groups is held
        return optimizer, list(model.parameters())

    assert_fused_alike(program)
    assert rates[0] == rates[1] and len(set(rates[0])) > 2


@each_class
def test_the_old_name_of_what_was_fused_is_the_new_optimizer(name):
    """zero_grad, step, state_dict and groups by either name: there is one optimizer."""

    def program(turn):
        model, old = model_and(CLASSES[name][1], **OPTIONS[name])
        new = turn(old)
        train(model, new, 1)
        train(model, old, 1, start=1)
        old.load_state_dict(new.state_dict())
        new.load_state_dict(old.state_dict())
        extra = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
        old.add_param_group({"params": [extra]})
        new.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))]})
        extra.grad = torch.ones_like(extra)
        train(model, old, 1, start=2)
        assert len(old.param_groups) == len(new.param_groups) == 3
        old.zero_grad()
        assert extra.grad is None
        if turn is trainopt.fuse:
            assert type(old) is CLASSES[name][0] and new.completed_steps == 3
            again, other = pickle.loads(pickle.dumps((old, new)))
            assert again is other
        return old, [*model.parameters(), extra]

    assert_fused_alike(program)


@each_class
def test_copies_of_a_fused_optimizer_and_its_scheduler_belong_together(name):
    for duplicate in (copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))):
        _, old = model_and(CLASSES[name][1], **OPTIONS[name])
        scheduler = torch.optim.lr_scheduler.LinearLR(old, 0.1, total_iters=5)
        optimizer = trainopt.fuse(old)
        optimizer, scheduler = duplicate((optimizer, scheduler))
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
        before = optimizer.param_groups[0]["lr"]
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] > before and type(optimizer) is CLASSES[name][0]


@each_class
def test_fuse_leaves_a_step_that_somebody_else_replaced(name):
    _, optimizer = model_and(CLASSES[name][1], **OPTIONS[name])
    torchs, calls = optimizer.step, []
    optimizer.step = lambda *a, **k: (calls.append(1), torchs(*a, **k))[1]
    with pytest.warns(UserWarning, match="step was replaced"):
        trainopt.fuse(optimizer)
    optimizer.step()
    assert calls == [1]


@each_class
def test_fuse_of_an_optimizer_whose_own_step_was_kept_by_somebody(name):
    """Accelerate puts the bound method back after a step under its scaler."""
    _, optimizer = model_and(CLASSES[name][1], **OPTIONS[name])
    optimizer.step = optimizer.step
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainopt.fuse(optimizer)
    optimizer.step()
    assert optimizer.completed_steps == 1


@each_class
def test_who_holds_the_groups_holds_them_after_loading(name):
    model, optimizer = model_and(CLASSES[name][0], **OPTIONS[name])
    groups, group, params = optimizer.param_groups, optimizer.param_groups[0], optimizer.param_groups[0]["params"]
    _, other = model_and(CLASSES[name][1], **{**OPTIONS[name], "lr": 0.25})
    other.param_groups[0]["tag"] = "mine"
    optimizer.load_state_dict(other.state_dict())
    assert optimizer.param_groups is groups and groups[0] is group and group["params"] is params
    assert group["lr"] == 0.25 and group["tag"] == "mine" and list(group) == list(other.state_dict()["param_groups"][0])
    group.update(TABLE[name].still)
    values = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, 1)
    assert all(torch.equal(p, v) for p, v in zip(model.parameters(), values, strict=True))


def test_fuse_takes_the_classes_that_there_are_and_its_own():
    p = [torch.nn.Parameter(torch.zeros(2))]

    class Other(torch.optim.AdamW):
        pass

    for optimizer in (torch.optim.LBFGS(p), Other(p), torch.optim.SparseAdam(p)):
        with pytest.raises(TypeError, match=type(optimizer).__qualname__):
            trainopt.fuse(optimizer)
    with pytest.raises(TypeError, match="Linear"):
        trainopt.fuse(torch.nn.Linear(1, 1))
    mine = trainopt.AdamW(p)
    assert trainopt.fuse(mine) is mine


@pytest.mark.parametrize("name", WITH_FUSED)
def test_fuse_with_gradscaler(name):
    def program(turn):
        model, optimizer = model_and(CLASSES[name][1], **OPTIONS[name], fused=True if turn is trainopt.fuse else None)
        optimizer = turn(optimizer)
        assert turn is not trainopt.fuse or optimizer._step_supports_amp_scaling
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        for i in range(4):
            optimizer.zero_grad()
            scaler.scale(model(torch.full((3, 5), 0.3 * (i + 1), dtype=torch.float64)).square().sum()).backward()
            if i == 1:
                model[0].bias.grad[0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
        return optimizer, list(model.parameters())

    assert_fused_alike(program)
