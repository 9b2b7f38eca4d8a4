"""The two sides of each comparison, and a model and data for both."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import trainopt


class Side(NamedTuple):
    """A library's optimizers, losses and clipping."""

    name: str
    optim: Any
    losses: Any
    clip: Callable[..., Tensor]


TORCH = Side("torch", torch.optim, nn.functional, nn.utils.clip_grad_norm_)
TRAINOPT = Side("trainopt", trainopt, trainopt.functional, trainopt.clip_grad_norm_)

#: Options with which a wrong step, a lost state or a decayed bias shows after a few steps.
OPTIONS = {
    "SGD": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1},
    "Adam": {"lr": 0.01, "betas": (0.8, 0.9)},
    "AdamW": {"lr": 0.01, "betas": (0.8, 0.9), "weight_decay": 0.1},
}

each_optimizer = pytest.mark.parametrize("name", OPTIONS)


def make(side: Side, name: str, params: Iterable[Any], **options: Any) -> torch.optim.Optimizer:
    return getattr(side.optim, name)(params, **OPTIONS[name], **options)


def classifier() -> nn.Module:
    """The same one every time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 4))


def examples(count: int = 48) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(6, generator=generator), torch.randint(4, (), generator=generator)) for _ in range(count)]


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same(run: Callable[[Side], dict[str, Tensor]], rtol: float = 1e-4, atol: float = 1e-6) -> dict[str, Tensor]:
    """Runs the program on both sides; returns trainopt's values."""
    torchs, ours = run(TORCH), run(TRAINOPT)
    compare(ours, torchs, rtol, atol)
    return ours


def compare(ours: dict[str, Tensor], torchs: dict[str, Tensor], rtol: float = 1e-4, atol: float = 1e-6) -> None:
    assert ours.keys() == torchs.keys() and ours
    for key, value in torchs.items():
        torch.testing.assert_close(ours[key], value, rtol=rtol, atol=atol, msg=lambda text, key=key: f"{key}: {text}")


def assert_moved(after: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    """A comparison of models that were not trained shows nothing."""
    assert any(not torch.equal(after[key], before[key]) for key in before)
