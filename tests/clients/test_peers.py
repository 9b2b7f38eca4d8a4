"""Optimizers that torch does not have, beside those that people take them from, timm's and the authors': the same
weights in float64."""

from itertools import product

import lion_pytorch
import pytest
import pytorch_optimizer
import torch
from prodigyopt import Prodigy
from timm.optim import Adan, Lamb, Lars, Lion, NvNovoGrad
from timm.utils import adaptive_clip_grad

import trainopt

#: Ours, theirs, their options that make the rule the published one, and the options that both are given.
PEERS = {
    "LAMB": (
        trainopt.LAMB,
        Lamb,
        {"max_grad_norm": None},  # before LAMB, timm clips
        {
            "lr": [0.01],
            "betas": [(0.9, 0.999), (0.7, 0.8)],
            "eps": [1e-6, 1e-2],
            "weight_decay": [0.0, 0.05],
            "bias_correction": [True, False],
            "trust_clip": [False, True],
            "always_adapt": [False, True],
            "grad_averaging": [True, False],
            "decoupled_decay": [False, True],
        },
    ),
    "LARS": (
        trainopt.LARS,
        Lars,
        {},
        {
            "lr": [0.3],
            "momentum": [0.0, 0.9],
            "dampening": [0.0, 0.5],
            "nesterov": [False, True],
            "weight_decay": [0.0, 0.05],
            "trust_coeff": [0.02],
            "trust_clip": [False, True],
            "always_adapt": [False, True],
        },
    ),
    "Adan": (
        trainopt.Adan,
        Adan,
        {"foreach": False},
        {
            "lr": [0.01],
            "betas": [(0.98, 0.92, 0.99), (0.7, 0.4, 0.8)],
            "eps": [1e-8, 1e-2],
            "weight_decay": [0.0, 0.1],
            "no_prox": [False, True],
        },
    ),
    "NovoGrad": (
        trainopt.NovoGrad,
        NvNovoGrad,
        {},
        {
            "lr": [0.01],
            "betas": [(0.95, 0.98), (0.7, 0.4)],
            "eps": [1e-8, 1e-2],
            "weight_decay": [0.0, 0.05],
            "grad_averaging": [False, True],
            "amsgrad": [False, True],
            "decoupled_decay": [False, True],
        },
    ),
    "Prodigy": (
        trainopt.Prodigy,
        Prodigy,
        {},
        {
            "lr": [0.5],
            "betas": [(0.9, 0.999), (0.0, 0.9)],
            "beta3": [None, 0.9],
            "weight_decay": [0.0, 0.05],
            "decouple": [True, False],
            "use_bias_correction": [False, True],
            "safeguard_warmup": [False, True],
            "growth_rate": [float("inf"), 1.05],
            "d_coef": [1.5],
        },
    ),
    "AdEMAMix": (
        trainopt.AdEMAMix,
        pytorch_optimizer.AdEMAMix,
        {"weight_decouple": True},  # its warm-up goes by another formula
        {
            "lr": [0.01],
            "betas": [(0.9, 0.999, 0.9999), (0.5, 0.8, 0.95)],
            "alpha": [0.0, 3.0],
            "eps": [1e-8, 1e-2],
            "weight_decay": [0.0, 0.1],
        },
    ),
    "Lion of its implementation for torch": (
        trainopt.Lion,
        lion_pytorch.Lion,
        {},
        {"lr": [1e-3], "betas": [(0.9, 0.99), (0.5, 0.8)], "weight_decay": [0.0, 0.1]},
    ),
    "Lion": (
        trainopt.Lion,
        Lion,
        {},
        {"lr": [1e-3], "betas": [(0.9, 0.99), (0.5, 0.8)], "weight_decay": [0.0, 0.1]},
    ),
}


def cases() -> list:
    rows = []
    for name, (_, _, _, options) in PEERS.items():
        for values in product(*options.values()):
            chosen = dict(zip(options, values, strict=True))
            if not chosen.get("nesterov") or (chosen["momentum"] and not chosen["dampening"]):
                rows.append(pytest.param(name, chosen, id=f"{name}-{'-'.join(map(str, values))}"))
    return rows


def trained(cls, steps, **options):
    """Parameters after so many steps down a bowl with noise; one of them is 0, which has no norm."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 5), (7,), (), (4, 3, 2))
    params = [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]
    params.append(torch.zeros(6, dtype=torch.float64, requires_grad=True))
    other = {"eps": 1e-3} if "d_coef" in options else {"lr": options["lr"] / 2}  # Prodigy has one lr for all groups
    optimizer = cls([{"params": params[:2]}, {"params": params[2:], **other}], **options)
    for _ in range(steps):
        for p in params:
            p.grad = p.detach() + torch.randn(p.shape, dtype=torch.float64, generator=generator)
        optimizer.step()
    numbers = ("d", "d_max", "d_numerator", "d_denom", "d_hat", "k")
    found = {name: group[name] for group in optimizer.param_groups for name in numbers if name in group}
    return [*(p.detach() for p in params), *torch.tensor(list(found.values()), dtype=torch.float64)]


@pytest.fixture
def float64_numbers():
    """timm's NovoGrad has its average of squares in torch's default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("name", "options"), cases())
@pytest.mark.usefixtures("float64_numbers")
def test_the_weights_are_those_of_the_field(name, options):
    ours, theirs, agreed, _ = PEERS[name]
    start = trained(ours, 0, **options)
    mine, others = trained(ours, 200, **options), trained(theirs, 200, **options, **agreed)
    # Of what Prodigy's first steps move a parameter by, 1e-6, float64 has ten digits beside it.
    tolerance = {"rtol": 1e-6, "atol": 1e-8} if name == "Prodigy" else {"rtol": 1e-10, "atol": 1e-12}
    for found, expected in zip(mine, others, strict=True):
        torch.testing.assert_close(found, expected, **tolerance)
    for before, found in zip(start[:5], mine, strict=False):
        assert not torch.equal(before, found)


@pytest.mark.parametrize("factor", [0.01, 0.5])
def test_adaptive_clipping_is_timms(factor):
    torch.manual_seed(0)
    pairs = []
    for shape in [(), (5,), (4, 6), (6, 3, 2, 2), (3, 1)]:
        weight, gradient = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
        pair = [torch.nn.Parameter(weight.clone()) for _ in range(2)]
        for p in pair:
            p.grad = gradient.clone()
        pairs.append(pair)
    ours, theirs = zip(*pairs, strict=True)
    trainopt.adaptive_clip_grad_(ours, factor)
    adaptive_clip_grad(theirs, factor)
    for p, q in pairs:
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-15)
