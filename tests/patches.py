"""trainopt in torch's place: what is replaced, what stood there before, and both ways to put it there."""

import sys

import torch

from trainopt import patching

REPLACED = [(place, name) for place, names in patching._PLACES.items() for name in names]
REPLACED = [(place, name) for place, name in REPLACED if hasattr(sys.modules[place], name)]


def standing():
    """What stands in torch's namespaces now."""
    return {(place, name): vars(sys.modules[place])[name] for place, name in REPLACED}


BEFORE = standing()


def take_away():
    """Puts torch back, whatever was left there; returns what was."""
    left = {key for key, found in standing().items() if found is not BEFORE[key]}
    for place, name in left:
        setattr(sys.modules[place], name, BEFORE[place, name])
    patching._patches.clear()
    patching._replaced.clear()
    return left


def by_hand(monkeypatch):
    """As people do it: one assignment after the other."""
    for place in ("torch.optim", "torch.nn", "torch.nn.functional", "torch.nn.utils"):
        for name, ours in patching._PLACES[place].items():
            if hasattr(sys.modules[place], name):
                monkeypatch.setattr(f"{place}.{name}", ours)


# What losses are given ------------------------------------------------------------------------------------------------


def rows(classes=5, dtype=torch.float32, device="cpu"):
    return torch.linspace(-2, 2, 4 * classes).reshape(4, classes).to(device, dtype)


LABELS = torch.tensor([0, 1, 2, 3])
P = torch.rand(4, 5, generator=torch.Generator().manual_seed(0)).softmax(1)
