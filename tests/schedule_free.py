"""Schedule-free optimizers after some steps, and what is looked at in them."""

import pytest
import torch
from helpers import OPTIONS, assert_same_bits

import trainopt

NAMES = ("AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree")
each_class = pytest.mark.parametrize("name", NAMES)

SHAPES = ((), (7,), (33, 20), (0, 3), (5000,))


def momentum_of(optimizer):
    group = optimizer.param_groups[0]
    return group["momentum"] if "momentum" in group else group["betas"][0]


def numbers(optimizer):
    names = ("k", "weight_sum", "lr_max", "scheduled_lr")
    return [{key: group[key] for key in names} for group in optimizer.param_groups]


def stepped(name, dtype=torch.float32, steps=3, shapes=SHAPES, **options):
    """An optimizer after some steps of random gradients, and its parameters."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    optimizer = getattr(trainopt, name)(params, **{**OPTIONS[name], **options})
    optimizer.train()
    return optimizer, step(optimizer, params, steps)


def step(optimizer, params, steps=1, seed=1, make=None):
    """Makes steps of random gradients, by another function than `optimizer.step` if one is given."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator)
        (make or optimizer.step)()
    return params


def values(params):
    return [p.detach().clone() for p in params]


def assert_same_values(one, other):
    """Of two optimizers, whatever the order of their states' keys."""
    sides = [
        {**side, "members": [], "states": [dict(sorted(state.items())) for state in side["states"]]}
        for side in (one, other)
    ]
    assert_same_bits(*sides)
