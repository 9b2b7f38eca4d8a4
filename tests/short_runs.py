"""A few steps of parameters that every run begins with, for tests of what is kept of them."""

import torch
from helpers import SHAPES


def twin_of(params):
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def with_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, dtype=torch.float64, generator=generator).to(p.dtype)
    return params


def steps(optimizer, params, seeds):
    for seed in seeds:
        with_gradients(params, seed)
        optimizer.step()


def start(dtype=torch.float64, shapes=SHAPES):
    generator = torch.Generator().manual_seed(5)
    return [
        torch.nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)) for shape in shapes
    ]


def after(cls, params, seeds, **options):
    optimizer = cls(params, **options)
    steps(optimizer, params, seeds)
    return optimizer, params
