"""Optimizers of two groups under a Schedule, and what their options are in each update."""

import pytest
import torch

import trainopt
from trainopt import Schedule
from trainopt.schedules import cosine, linear, warmup

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
each_adamw = pytest.mark.parametrize("make", [trainopt.AdamW, torch.optim.AdamW], ids=["ours", "torch's"])


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


def run(optimizer, schedule, steps, *names):
    """What these options are in each update, of every group: (lr, weight_decay) if nothing is said."""
    seen = []
    for _ in range(steps):
        seen.append(options_of(optimizer, *(names or ("lr", "weight_decay"))))
        optimizer.step()
        schedule.step()
    return seen
