"""Runs that the training tests start in processes of their own: everything random, everything stateful, and small."""

import os
import random
import signal
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import trainopt
from trainopt.training import Silent, fit


class Augmented(Dataset):
    """Samples that are never the same twice: each draws from torch's, NumPy's and Python's generator."""

    def __init__(self, samples=52, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(samples, 6, generator=generator)
        self.targets = torch.randint(0, 3, (samples,), generator=generator)
        self.targets[::5] = -100

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        noise = 0.1 * torch.randn(6) + 0.1 * float(np.random.rand()) + 0.1 * random.random()
        return self.inputs[index] + noise, self.targets[index]


def network():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


class Tempered(nn.Module):
    """A loss that learns, keeps count, and draws: all of it must come back with the run."""

    def __init__(self):
        super().__init__()
        self.log_temperature = nn.Parameter(torch.zeros(3))
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.dropout = nn.Dropout(0.1)

    def forward(self, output, target):
        loss = nn.functional.cross_entropy(self.dropout(output) * self.log_temperature.exp(), target)
        if self.training:
            self.mean.lerp_(loss.detach(), 0.1)
            self.calls += 1
        return loss + 0.01 * self.mean


class Stopping(nn.Module):
    """A loss that sends this process a signal at its n-th call."""

    def __init__(self, loss, call, number=signal.SIGTERM):
        super().__init__()
        self.loss, self.call, self.number, self.calls = loss, call, number, 0

    def forward(self, output, target):
        if torch.is_grad_enabled():
            self.calls += 1
            if self.calls == self.call:
                os.kill(os.getpid(), self.number)
        return self.loss(output, target)


def train(directory, result=None, stop_at=None, seed=0, workers=0, number=signal.SIGTERM, **choices):
    """The run of the resume tests, to its end or to the signal; writes the final state to `result` if it ends."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    model, loss = network(), Tempered()
    optimizer = trainopt.AdamW([*model.parameters(), *loss.parameters()], lr=0.01, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=10_000)
    choices = {
        "epochs": 3,
        "accumulation": 3,
        "checkpoint_every": 4,
        "average": 0.9,
        "clip": 1.0,
        "log_every": 5,
        **choices,
    }
    outcome = fit(
        model,
        DataLoader(Augmented(), batch_size=8, shuffle=True, num_workers=workers),
        Stopping(loss, stop_at or -1, number),
        optimizer,
        schedule=schedule,
        validation=(Augmented(seed=1).inputs, Augmented(seed=1).targets.clamp(min=0)),
        count=lambda target: int((target != -100).sum()),
        directory=directory,
        report=Silent(),
        **choices,
    )
    if result is not None and outcome.reason == "finished":
        final = {
            "model": dict(model.state_dict()),
            "criterion": dict(loss.state_dict()),
            "optimizer": optimizer.state_dict()["state"],
            "lr": schedule.get_last_lr(),
            "average": outcome.average,
            "criterion average": outcome.criterion_average,
            "random": [torch.get_rng_state(), torch.tensor(random.random()), torch.tensor(np.random.rand())],
            "loss": outcome.loss,
            "best": outcome.best,
            "step": outcome.step,
        }
        torch.save(final, Path(result).with_suffix(".partial"))
        os.replace(Path(result).with_suffix(".partial"), result)
    return outcome


def default_fit(
    directory, epochs=4, heard=None, model_of=lambda: nn.Linear(3, 4), lr=0.1, momentum=0.0, optimizer=None, **choices
):
    """A small run of 4 updates an epoch that says nothing of checkpoints; returns the model and the result.

    Args:
        choices: fit's, with `schedule` as a function of the optimizer.
    """
    torch.manual_seed(0)
    model = model_of()
    data = (torch.randn(20, 3), torch.randint(0, 4, (20,)))
    optimizer = optimizer or trainopt.SGD(model.parameters(), lr=lr, momentum=momentum)
    make = choices.pop("schedule", None)
    choices = {"epochs": epochs, "batch_size": 5, "seed": 3, "report": heard or Silent(), **choices}
    schedule = make and make(optimizer)
    return model, fit(model, data, nn.CrossEntropyLoss(), optimizer, directory=directory, schedule=schedule, **choices)


def held_out():
    """Data to validate such a run with."""
    return torch.randn(6, 3), torch.randint(0, 4, (6,))


def said(heard, topic="resume"):
    return [message.text for message in heard.named("Message") if message.topic == topic]


def assert_same(a, b, where="run"):
    """Two trees are the same, tensors to the bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), f"{where}: {a} and {b}"
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where
