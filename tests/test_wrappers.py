"""Wrappers of an optimizer: what looks at one, schedules it or takes it over sees the optimizer inside."""

import copy
import warnings

import pytest
import torch
from helpers import CLASSES, NAMES, OPTIONS, each_class

import trainopt
from trainopt.optim.wrappers import unwrapped
from trainopt.schedules import linear

Optimizer = torch.optim.Optimizer


class Delegating(Optimizer):
    """Accelerate's pattern: an Optimizer that never calls Optimizer.__init__."""

    name = "optimizer"

    def __init__(self, optimizer):
        self.__dict__[self.name] = optimizer

    held = property(lambda self: self.__dict__[self.name])
    param_groups = property(lambda self: self.held.param_groups)
    state = property(lambda self: self.held.state)
    defaults = property(lambda self: self.held.defaults)

    def step(self, closure=None):
        return self.held.step(closure)

    def zero_grad(self, set_to_none=True):
        self.held.zero_grad(set_to_none)

    def state_dict(self):
        return self.held.state_dict()

    def load_state_dict(self, state_dict):
        self.held.load_state_dict(state_dict)

    def add_param_group(self, group):
        self.held.add_param_group(group)


class Hidden(Delegating):
    """The same, under a name that nobody knows."""

    name = "_inner"


class Copying:
    """Fabric's pattern: the optimizer's class and attributes, copied when it was made."""

    def __init__(self, optimizer):
        kept = {k: v for k, v in optimizer.__dict__.items() if k not in ("step", "state_dict", "zero_grad")}
        self.__dict__.update(kept)
        self.__class__ = type("Copied" + type(optimizer).__name__, (type(self), type(optimizer)), {})
        self._kept_optimizer = optimizer

    def step(self, closure=None):
        return self._kept_optimizer.step(closure) if closure else self._kept_optimizer.step()

    def state_dict(self):
        return self._kept_optimizer.state_dict()

    def load_state_dict(self, state_dict):
        self._kept_optimizer.load_state_dict(state_dict)
        self.__dict__.update({k: v for k, v in self._kept_optimizer.__dict__.items() if k != "step"})


class Fabric(Copying):
    optimizer = property(lambda self: self._kept_optimizer)


class Forwarding:
    """Newer Fabric's: the class is imitated, and what is asked for is forwarded."""

    def __init__(self, optimizer):
        self._kept_optimizer = optimizer
        self.__class__ = type("Forwarding" + type(optimizer).__name__, (type(self), type(optimizer)), {})

    optimizer = property(lambda self: self._kept_optimizer)

    def step(self, closure=None):
        return self._kept_optimizer.step()

    def load_state_dict(self, state_dict):
        self._kept_optimizer.load_state_dict(state_dict)

    def __getattr__(self, name):
        return getattr(self._kept_optimizer, name)


class Lookahead:
    """No Optimizer at all, and slow weights of its own."""

    def __init__(self, optimizer):
        self.base_optimizer = optimizer
        self.param_groups = optimizer.param_groups

    def step(self, closure=None):
        self.base_optimizer.step(closure)

    def load_state_dict(self, state_dict):
        self.base_optimizer.load_state_dict(state_dict)


TRANSPARENT = {
    "delegating": Delegating,
    "copying": Fabric,
    "forwarding": Forwarding,
    "lookahead": Lookahead,
    "two, one in the other": lambda optimizer: Delegating(Fabric(optimizer)),
    "three": lambda optimizer: Lookahead(Delegating(Forwarding(optimizer))),
}
each_wrapper = pytest.mark.parametrize("wrap", TRANSPARENT.values(), ids=TRANSPARENT)
each_pattern = pytest.mark.parametrize(
    "wrap", [*TRANSPARENT.values(), Hidden, Copying], ids=[*TRANSPARENT, "hidden", "copying, hidden"]
)
sides = pytest.mark.parametrize("side", [0, 1], ids=["ours", "torch's"])


def optimizer_of(cls, name, **options):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(5))
    p.grad = torch.ones(5)
    return cls([("p", p)], **{**OPTIONS[name], **options})


@each_class
@each_wrapper
def test_explain_and_nonfinite_report(name, wrap):
    optimizer = optimizer_of(CLASSES[name][0], name)
    wrapper = wrap(optimizer)
    assert unwrapped(wrapper) is optimizer
    assert trainopt.explain(wrapper) == trainopt.explain(optimizer)
    assert trainopt.explain(wrapper)[0].path.startswith("fused")
    optimizer.param_groups[0]["params"][0].grad[1] = torch.nan
    assert trainopt.nonfinite_report(wrapper) == optimizer.nonfinite_report()
    assert trainopt.nonfinite_report(wrapper)[0].parameter == "'p'"


@each_class
def test_nonfinite_report_of_torchs_optimizers(name):
    optimizer = optimizer_of(CLASSES[name][1], name)
    assert not trainopt.nonfinite_report(optimizer)
    optimizer.param_groups[0]["params"][0].grad[1] = torch.inf
    assert [(row.tensor, row.inf) for row in trainopt.nonfinite_report(optimizer)] == [("gradient", 1)]


@each_class
@each_wrapper
def test_fuse(name, wrap):
    optimizer = optimizer_of(CLASSES[name][1], name)
    wrapper = wrap(optimizer)
    assert trainopt.fuse(wrapper) is wrapper
    assert unwrapped(wrapper) is optimizer and type(optimizer) is CLASSES[name][0]
    before = optimizer.param_groups[0]["params"][0].detach().clone()
    wrapper.step()
    assert optimizer.completed_steps == 1
    assert not torch.equal(optimizer.param_groups[0]["params"][0], before)
    assert trainopt.fuse(wrapper) is wrapper


def test_fuse_names_what_it_finds_inside():
    with pytest.raises(TypeError, match="SparseAdam"):
        trainopt.fuse(Delegating(torch.optim.SparseAdam([torch.zeros(1)])))


def rates(schedule_class, optimizer, steps, load_at=None, **options):
    """The learning rates of the updates under a scheduler."""
    scheduler = schedule_class(optimizer, **options)
    held = unwrapped(optimizer)
    held = getattr(held, "_inner", getattr(held, "_kept_optimizer", held))
    seen = []
    for i in range(steps):
        if i == load_at:
            optimizer.load_state_dict(copy.deepcopy(held.state_dict()))
        seen.append(held.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen, scheduler


@each_class
@sides
@each_pattern
@pytest.mark.parametrize("load_at", [None, 2])
def test_schedule_moves_what_torchs_schedulers_move(name, side, wrap, load_at):
    cls = CLASSES[name][side]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours, schedule = rates(
            trainopt.Schedule, wrap(optimizer_of(cls, name, lr=0.1)), 6, load_at, lr=linear(5, start=1.0, end=0.5)
        )
        plain, _ = rates(
            torch.optim.lr_scheduler.LinearLR,
            optimizer_of(cls, name, lr=0.1),
            6,
            start_factor=1.0,
            end_factor=0.5,
            total_iters=5,
        )
    assert ours == pytest.approx(plain)
    assert schedule.last_epoch == 6


@each_class
@sides
@pytest.mark.parametrize("wrap", [Delegating, Hidden], ids=["delegating", "hidden"])
def test_groups_that_a_wrapper_adds_are_scheduled(name, side, wrap):
    optimizer = optimizer_of(CLASSES[name][side], name, lr=0.1)
    wrapper = wrap(optimizer)
    schedule = trainopt.Schedule(wrapper, lr=linear(10))
    for _ in range(5):
        wrapper.step()
        schedule.step()
    wrapper.add_param_group({"params": [("q", torch.nn.Parameter(torch.zeros(2)))], "lr": 4.0})
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 2.0])


@pytest.mark.parametrize("name", NAMES)
def test_a_schedule_that_was_there_before_the_wrapper(name):
    optimizer = optimizer_of(CLASSES[name][0], name, lr=0.1)
    schedule = trainopt.Schedule(optimizer, lr=linear(10))
    for wrap in (Fabric, Forwarding, Delegating):
        wrapper = wrap(optimizer)
        wrapper.step()
        schedule.step()
    assert schedule.last_epoch == 3 and optimizer.param_groups[0]["lr"] == pytest.approx(0.07)


def test_of_a_circle_there_is_an_end():
    optimizer = optimizer_of(trainopt.SGD, "SGD")
    one, two = Lookahead(optimizer), Lookahead(optimizer)
    one.base_optimizer, two.base_optimizer = two, one
    assert unwrapped(one) in (one, two)


# The wrappers themselves, where they are installed --------------------------------------------------------------------


@each_class
def test_accelerate(name):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    seen = []
    for fusing in (True, False):
        model = torch.nn.Linear(3, 2)
        optimizer = CLASSES[name][1](model.parameters(), **OPTIONS[name])
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5)
        if fusing:
            optimizer = trainopt.fuse(optimizer)
        model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
        if fusing:
            assert trainopt.explain(optimizer)[0].path.startswith("fused")
        seen.append([])
        for _ in range(6):
            accelerator.backward(model(torch.ones(4, 3)).square().sum())
            seen[-1].append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    assert seen[0] == seen[1] and len(set(seen[0])) > 3


@each_class
def test_fabric(name):
    fabric_module = pytest.importorskip("lightning.fabric")
    fabric = fabric_module.Fabric(accelerator="cpu", devices=1)
    model = torch.nn.Linear(3, 2)
    model, optimizer = fabric.setup(model, CLASSES[name][0](model.parameters(), **{**OPTIONS[name], "lr": 0.1}))
    schedule = trainopt.Schedule(optimizer, lr=linear(10))
    for _ in range(3):
        fabric.backward(model(torch.ones(4, 3)).square().sum())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.07)
    assert trainopt.explain(optimizer)[0].path.startswith("fused") and not trainopt.nonfinite_report(optimizer)
