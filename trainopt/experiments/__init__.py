"""Two things to train that need no download: `digits` and `charlm`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trainopt.cli.settings import Option
from trainopt.training.report import Report

NAMES = ("digits", "charlm")


@dataclass(frozen=True)
class Task:
    """What an experiment gives to the training loop; the fields are the arguments of `trainopt.training.fit`."""

    title: str
    model: nn.Module
    data: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    loss: Callable[[Any, Any], Tensor]
    metrics: Mapping[str, Callable[[Any, Any], Any]] = field(default_factory=dict)
    count: Callable[[Any], int] | None = None


class Experiment(Protocol):
    """A module of this package."""

    DESCRIPTION: str
    OPTIONS: tuple[Option, ...]  # its own
    DEFAULTS: Mapping[str, Any]  # of the common options, where they are its own

    def check(self, settings: SimpleNamespace) -> None:
        """ValueError, "argument --name: …", for options that do not go together; reads no data."""
        ...

    def make(self, settings: SimpleNamespace) -> Task:
        """Data and model. ValueError or OSError where the data cannot be had as it was asked for."""
        ...

    def reporter(self, task: Task, settings: SimpleNamespace, optimizer: torch.optim.Optimizer) -> Report | None:
        """What tells the person of the run, if it is not the usual one; called before the options are made."""
        ...

    def finish(self, task: Task, settings: SimpleNamespace) -> None:
        """What is to be shown of the trained model."""
        ...


def load(name: str) -> Experiment:
    """The experiment of this name."""
    module: Any = importlib.import_module(f"trainopt.experiments.{name}")
    return module
