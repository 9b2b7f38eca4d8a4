"""The schedule-free optimizers beside their authors' package: the same weights in float64, groups and state dicts."""

import copy
import inspect
from itertools import product

import pytest
import schedulefree
import torch

import trainopt

#: The options that both are given.
OPTIONS = {
    "AdamWScheduleFree": {
        "lr": [0.01],
        "betas": [(0.9, 0.999), (0.6, 0.9)],
        "eps": [1e-8, 1e-2],
        "weight_decay": [0.0, 0.1],
        "warmup_steps": [0, 20],
        "r": [0.0, 1.0],
        "weight_lr_power": [2.0, 0.0],
    },
    "RAdamScheduleFree": {
        "lr": [0.01],
        "betas": [(0.9, 0.999), (0.6, 0.9)],
        "weight_decay": [0.0, 0.1],
        "r": [0.0, 1.0],
        "weight_lr_power": [2.0, 0.5],
        "silent_sgd_phase": [True, False],
    },
    "SGDScheduleFree": {
        "lr": [0.3],
        "momentum": [0.9, 0.5],
        "weight_decay": [0.0, 0.1],
        "warmup_steps": [0, 20],
        "r": [0.0, 1.0],
        "weight_lr_power": [2.0, 0.0],
    },
}
each_class = pytest.mark.parametrize("name", OPTIONS)


def made(library, name, **options):
    """An optimizer of two groups, and its parameters."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(n, dtype=torch.float64, generator=generator).requires_grad_() for n in (15, 7, 1, 24)]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": options["lr"] / 2}]
    optimizer = getattr(library, name)(groups, **options)
    optimizer.train()
    return optimizer, params


def step(optimizer, params, steps, seed=1):
    """Steps down a bowl with noise, with an evaluation now and then."""
    generator = torch.Generator().manual_seed(seed)
    for now in range(steps):
        for p in params:
            p.grad = p.detach() + torch.randn(p.shape, dtype=torch.float64, generator=generator)
        optimizer.step()
        if now % 30 == 29:
            optimizer.eval()
            optimizer.train()


def assert_same(ours, theirs):
    """Optimizers with their parameters: in weights, states and the numbers of their groups."""
    for mine, other in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)
        held = ours[0].state[mine], theirs[0].state[other]
        assert set(held[0]) == set(held[1])
        for key in held[0]:
            torch.testing.assert_close(held[0][key], held[1][key], rtol=1e-10, atol=1e-12)
    for mine, other in zip(ours[0].param_groups, theirs[0].param_groups, strict=True):
        for key in other.keys() - {"params"}:
            assert mine[key] == (pytest.approx(other[key], rel=1e-12) if type(other[key]) is float else other[key]), key


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (name, dict(zip(options, values, strict=True)))
        for name, options in OPTIONS.items()
        for values in product(*options.values())
    ],
)
def test_the_weights_are_the_authors(name, options):
    ours, theirs = made(trainopt, name, **options), made(schedulefree, name, **options)
    start = [p.detach().clone() for p in ours[1]]
    for both in (ours, theirs):
        step(*both, 200)
    assert_same(ours, theirs)
    for both in (ours, theirs):
        both[0].eval()
    assert_same(ours, theirs)
    assert not any(torch.equal(p, begun) for p, begun in zip(ours[1], start, strict=True))


@each_class
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("to_ours", [True, False])
def test_state_dicts_go_both_ways(name, mode, to_ours):
    options = {option: values[-1] for option, values in OPTIONS[name].items()}
    first, second = (schedulefree, trainopt) if to_ours else (trainopt, schedulefree)
    source, truth = made(first, name, **options), made(schedulefree, name, **options)
    step(*source, 10)
    step(*truth, 10)
    for optimizer in (source[0], truth[0]):
        getattr(optimizer, mode)()
    target = made(second, name, lr=1.0)
    with torch.no_grad():
        for p, q in zip(target[1], source[1], strict=True):
            p.copy_(q)
    target[0].load_state_dict(copy.deepcopy(source[0].state_dict()))
    for both in (target, truth):
        both[0].train()
        step(*both, 10, seed=2)
    assert_same(target, truth)


@each_class
def test_signatures_and_groups_are_the_authors(name):
    ours, theirs = (getattr(library, name) for library in (trainopt, schedulefree))
    mine, others = ([*inspect.signature(cls).parameters.values()] for cls in (ours, theirs))
    for found, expected in zip(mine, others, strict=False):
        assert (found.name, found.default, found.kind) == (expected.name, expected.default, expected.kind)
    assert all(found.kind is inspect.Parameter.KEYWORD_ONLY for found in mine[len(others) :])
    groups = [cls([torch.ones(1, requires_grad=True)]).param_groups[0] for cls in (ours, theirs)]
    for key in groups[1].keys() - {"params"}:
        assert groups[0][key] == groups[1][key], key


def test_refusals_are_errors_on_both_sides():
    for library, options in product((trainopt, schedulefree), ({"momentum": 0.0}, {"momentum": 1.0}, {"lr": -1.0})):
        with pytest.raises(ValueError):
            library.SGDScheduleFree([torch.ones(1, requires_grad=True)], **options)
    for library in (trainopt, schedulefree):
        p = torch.ones(1, requires_grad=True)
        optimizer = library.AdamWScheduleFree([p])
        p.grad = torch.ones(1)
        with pytest.raises(Exception, match="mode"):
            optimizer.step()
