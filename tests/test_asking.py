"""Asking for state changes nothing: the steps that checkpoint tools make to have states are no steps."""

import copy

import pytest
import torch
from helpers import CLASSES, NAMES, OPTIONS, Twins, each_class, model_and
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

import trainopt
from trainopt.schedules import linear

CASES = {
    "SGD": ("SGD", {"lr": 0.1}),
    "SGD with noise": ("SGD", {"lr": 0.1, "noise": 0.01}),
    "SGD with momentum": ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "SGD with momentum and noise": ("SGD", {"lr": 0.1, "momentum": 0.9, "noise": 0.01}),
    "SGD with dampening": ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    "SGD with dampening and noise": ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "noise": 0.01}),
    "SGD with proximal L1": ("SGD", {"lr": 0.1, "l1": 0.1, "l1_proximal": True}),
    "Adam with decay": ("Adam", {"lr": 0.1, "weight_decay": 0.1}),
    "Adam with amsgrad": ("Adam", {"lr": 0.1, "amsgrad": True, "weight_decay": 0.1, "l1": 0.1}),
    "AdamW": ("AdamW", {"lr": 0.1}),
    "AdamW with noise": ("AdamW", {"lr": 0.1, "noise": 0.01}),
    "AdamW without bias correction": ("AdamW", {"lr": 0.1, "bias_correction": False}),
    "AdamW with a tensor": ("AdamW", {"lr": torch.tensor(0.1)}),
    "AdamW that skips": ("AdamW", {"lr": 0.1, "skip_nonfinite": True}),
}
each_case = pytest.mark.parametrize("name, options", CASES.values(), ids=CASES)


def gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator)


def train(model, optimizer, seeds):
    for seed in seeds:
        gradients(model, seed)
        optimizer.step()
        optimizer.zero_grad()


def ask_dcp(model, optimizer):
    get_optimizer_state_dict(model, optimizer)


def ask_by_hand(model, optimizer):
    """What torch.distributed.checkpoint does, by a tool of one's own, even if some states are there."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.0) if isinstance(group["lr"], torch.Tensor) else 0.0
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    optimizer.zero_grad()


def assert_same(model, optimizer, other_model, other):
    for p, q in zip(model.parameters(), other_model.parameters(), strict=True):
        assert torch.equal(p, q)
        for key, value in other.state.get(q, {}).items():
            assert torch.equal(optimizer.state[p][key], value), key
    assert optimizer.completed_steps == other.completed_steps


@each_case
@pytest.mark.parametrize("ask", [ask_dcp, ask_by_hand], ids=["DCP", "by hand"])
@pytest.mark.parametrize("path", ["engine", "torch's path"])
def test_a_run_that_was_asked_is_the_run_that_was_not(name, options, ask, path, monkeypatch):
    monkeypatch.setattr("trainopt.switches.REFERENCE_FORCED", path != "engine")
    fresh_model, fresh = model_and(CLASSES[name][0], **options)
    model, optimizer = model_and(CLASSES[name][0], **options)
    before = [p.detach().clone() for p in model.parameters()]
    ask(model, optimizer)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert optimizer.completed_steps == 0 and not optimizer.last_step_skipped
    for state in optimizer.state.values():
        assert state and not any(bool(value.any()) for value in state.values())
    train(model, optimizer, range(3))
    train(fresh_model, fresh, range(3))
    ask_dcp(model, optimizer)
    train(model, optimizer, range(3, 5))
    train(fresh_model, fresh, range(3, 5))
    assert_same(model, optimizer, fresh_model, fresh)


def test_the_first_update_of_adamw_has_its_learning_rate():
    for late in (False, True):
        model, optimizer = model_and(trainopt.AdamW, lr=0.1, weight_decay=0.0)
        if late:  # a parameter that comes later than the others
            train(model, optimizer, range(2))
            model.new = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
            optimizer.add_param_group({"params": [model.new], "lr": 0.1})
        states = [{k: v.clone() for k, v in state.items()} for state in optimizer.state.values()]
        ask_by_hand(model, optimizer)
        for before, after in zip(states, optimizer.state.values(), strict=False):
            assert all(torch.equal(after[k], v) for k, v in before.items())
        p = model.new if late else model[0].weight
        before = p.detach().clone()
        gradients(model, 7)
        optimizer.step()
        torch.testing.assert_close((p.detach() - before).abs(), torch.full_like(before, 0.1), rtol=1e-6, atol=0)


@each_class
def test_a_parameter_without_a_state_among_others_with_noise(name):
    outcomes = []
    for asked in (False, True):
        model, optimizer = model_and(CLASSES[name][0], **OPTIONS[name], noise=0.01)
        train(model, optimizer, range(2))
        del optimizer.state[model[0].bias]
        if asked:
            ask_by_hand(model, optimizer)
        train(model, optimizer, range(2, 4))
        outcomes.append((model, optimizer))
    assert_same(*outcomes[1], *outcomes[0])


@each_class
@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["float", "tensor"])
def test_a_warm_up_from_zero_counts_as_in_torch(name, lr):
    """With real gradients the first step is a step: moments move, and it is counted."""
    lr = lr.double() if isinstance(lr, torch.Tensor) else lr
    twins = Twins(name, lr=lr)
    twins.step()
    assert twins.ours.optimizer.completed_steps == 1
    for side in twins.sides:
        side.optimizer.param_groups[0]["lr"] = 0.1
    twins.step(2)


@each_class
def test_a_step_in_which_one_gradient_is_not_zero_counts(name):
    twins = Twins(name, lr=0.0)
    twins.set_gradients()
    twins.edit(lambda _, params: [p.grad.zero_() for p in params[:-1]])
    twins.edit(lambda o, _: o.step())
    twins.compare()
    assert twins.ours.optimizer.completed_steps == 1


def test_a_learning_rate_that_is_not_zero_everywhere_is_a_step():
    twins = Twins("AdamW")
    twins.edit(lambda o, params: o.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2).double())]}))
    for side in twins.sides:
        side.optimizer.param_groups[0]["lr"] = 0.0
        for p in side.params:
            p.grad = torch.zeros_like(p)
    twins.edit(lambda o, _: o.step())
    twins.compare()


def test_steps_without_any_gradient_count_as_they_did():
    """As when somebody plots a schedule that starts at 0."""
    optimizer = trainopt.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    schedule = trainopt.Schedule(optimizer, lr=linear(4, start=0.0, end=1.0))
    for _ in range(4):
        optimizer.step()
        schedule.step()
    assert schedule.last_epoch == 4


SCHEDULED = {
    **{f"trainopt.{name}": CLASSES[name][0] for name in NAMES},
    **{name: CLASSES[name][1] for name in NAMES},
    "RMSprop": torch.optim.RMSprop,
    "Adagrad": torch.optim.Adagrad,
    "NAdam": torch.optim.NAdam,
    "Rprop": torch.optim.Rprop,
}


@pytest.mark.parametrize("make", SCHEDULED.values(), ids=SCHEDULED)
@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_a_save_does_not_move_the_schedule(make, noise):
    """Five updates and three saves: the sixth update is made with 0.05."""
    if noise and not make.__module__.startswith("trainopt"):
        pytest.skip("an option of trainopt's")
    model, optimizer = model_and(make, lr=0.1, **({"noise": noise} if noise else {}))
    schedule = trainopt.Schedule(optimizer, lr=linear(10))
    for i in range(5):
        if i % 2 == 0:
            get_optimizer_state_dict(model, optimizer)
        train(model, optimizer, [i])
        schedule.step()
    get_optimizer_state_dict(model, optimizer)
    schedule.step()
    assert schedule.last_epoch == 5
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


@each_class
def test_a_closure_is_asked_before_the_gradients_are_looked_at(name):
    for cls in CLASSES[name]:
        model, optimizer = model_and(cls, lr=0.0)
        schedule = trainopt.Schedule(optimizer, lr=linear(10))
        for p in model.parameters():
            p.grad = torch.zeros_like(p)

        def closure(model=model):
            gradients(model, 3)
            return 1.0

        optimizer.step(closure)
        schedule.step()
        assert schedule.last_epoch == 1


@pytest.mark.parametrize("kind", ["sparse", "complex", "frozen"])
def test_gradients_of_other_kinds(kind):
    p = torch.nn.Parameter(torch.ones(4, 3, dtype=torch.complex64 if kind == "complex" else torch.float32))
    optimizer = trainopt.SGD([p, torch.nn.Parameter(torch.zeros(2), requires_grad=kind != "frozen")], momentum=0.5)
    optimizer.param_groups[0]["lr"] = 0.0
    p.grad = torch.zeros_like(p)
    if kind == "sparse":
        p.grad = p.grad.to_sparse()
    optimizer.step()
    assert optimizer.completed_steps == 0 and (p == 1).all()
    assert len(optimizer.state) == (1 if kind == "frozen" else 2)


def test_a_learning_rate_that_is_none_is_torchs_error():
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = trainopt.SGD([p])
    optimizer.param_groups[0]["lr"] = "fast"
    with pytest.raises(TypeError):
        optimizer.step()


@each_class
@pytest.mark.parametrize("flat", [False, True])
def test_saved_before_the_first_step_and_loaded(name, flat):
    """What a fresh run saves is a fresh start."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    fresh_model, fresh = model_and(CLASSES[name][0], **OPTIONS[name])
    model, optimizer = model_and(CLASSES[name][0], **OPTIONS[name])
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    set_optimizer_state_dict(model, optimizer, saved, options=options)
    train(model, optimizer, range(3))
    train(fresh_model, fresh, range(3))
    if CLASSES[name][0]._numbers:  # float32 in a fresh run, and float64 where torch has loaded them
        return torch.testing.assert_close(
            list(model.parameters()), list(fresh_model.parameters()), rtol=1e-6, atol=1e-8
        )
    assert_same(model, optimizer, fresh_model, fresh)
