"""Two things to train that need no download: `digits` and `charlm`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Protocol

from torch import Tensor, nn

NAMES = ("digits", "charlm")


@dataclass(frozen=True)
class Problem:
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
    Options: type  # a dataclass of its own options
    DEFAULTS: Mapping[str, Any]  # of the common options, where they are its own

    def check(self, settings: SimpleNamespace) -> None:
        """ValueError, "argument --name: …", for options that do not go together; reads no data."""
        ...

    def make(self, settings: SimpleNamespace) -> Problem:
        """Data and model. ValueError or OSError where the data cannot be had as it was asked for."""
        ...

    def finish(self, problem: Problem, settings: SimpleNamespace) -> None:
        """What is to be shown of the trained model."""
        ...


def load(name: str) -> Experiment:
    """The experiment of this name."""
    module: Any = importlib.import_module(f"trainopt.experiments.{name}")
    return module
