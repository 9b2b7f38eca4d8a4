"""Digits, trained by trainopt's loop and by its twin: a plain loop with torch's own optimizer and loss.

The twin has the same network and batches. It trains an epoch after each of the run's, so that a machine that slows down
for a while slows both. Before the first epoch each has taken a few steps on throw-away weights: costs paid once are in
neither figure.

    python -m benchmarks.twin [options of `trainopt train digits`]
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from trainopt.cli import options, setup, train
from trainopt.experiments import Problem, digits
from trainopt.optim import registry
from trainopt.training.data import Shard, TensorSource
from trainopt.training.report import Finished, Message, Progress, Started, Validated

#: With these the twin's plain loop does the same as the run.
COMPARED = {
    "accumulation": 1,
    "precision": "float32",
    "average": None,
    "early_stopping": None,
    "validate_every": None,
    "steps": None,
}
DESCRIPTION = f"{digits.DESCRIPTION} A twin is trained beside it, with torch.optim in a plain loop."
DEFAULTS, Options, make, finish = digits.DEFAULTS, digits.Options, digits.make, digits.finish
WARM_UP = 10  # steps
Optimizer = torch.optim.Optimizer
Batch = tuple[Tensor, Tensor]


class Epoch(NamedTuple):
    """What one pass over the training data gave and cost."""

    loss: float
    held_out_loss: float
    accuracy: float
    seconds: float
    step_seconds: float  # of them, inside optimizer.step()


@dataclass
class Side:
    """A network in training, its optimizer, and what its epochs gave. optimizer.step() is timed from now on."""

    name: str
    model: nn.Module
    optimizer: Optimizer
    epochs: list[Epoch] = field(default_factory=list)
    in_step: float = 0.0

    def __post_init__(self) -> None:
        step = self.optimizer.step

        @functools.wraps(step)
        def timed(*arguments: Any, **keywords: Any) -> Any:
            start = perf_counter()
            result = step(*arguments, **keywords)
            self.in_step += perf_counter() - start
            return result

        self.optimizer.step = timed  # type: ignore[method-assign]

    def seconds(self) -> float:
        """Training time of all epochs; evaluation is not in it."""
        return sum(epoch.seconds for epoch in self.epochs)

    def step_seconds(self) -> float:
        return sum(epoch.step_seconds for epoch in self.epochs)


class Comparison:
    """The reporter that trains the twin, prints a row an epoch for both, and at the end what they cost.

    Args:
        problem: what the run trains; its model has not been trained yet.
        optimizer: the run's.
        make_stock: the torch optimizer and the scheduler, if there is one, for the twin's model.
        batches: the batches of an epoch, in the run's own order.
        clip: largest global norm of the gradient, or None.
        head: lines to print first.
    """

    def __init__(
        self,
        problem: Problem,
        optimizer: Optimizer,
        make_stock: Callable[[nn.Module], tuple[Optimizer, Any]],
        batches: Callable[[int], Iterable[Batch]],
        clip: float | None,
        head: str,
    ) -> None:
        self.problem, self.batches, self.clip, self.head = problem, batches, clip, head
        twin = copy.deepcopy(problem.model)
        stock, self.scheduler = make_stock(twin)
        self.ours = Side(f"trainopt.{type(optimizer).__name__}", problem.model, optimizer)
        self.twin = Side(f"torch.optim.{type(stock).__name__}", twin, stock)
        self.bar = progress_bar() if sys.stdout.isatty() else None

    def train_twin(self, batches: Iterable[Batch]) -> tuple[float, float, float]:
        """An epoch of the plain loop: (mean loss, seconds, seconds in optimizer.step())."""
        side = self.twin
        total, samples, in_step = torch.zeros(()), 0, side.in_step
        start = perf_counter()
        for images, labels in batches:
            loss = cross_entropy(side.model(images), labels)
            side.optimizer.zero_grad()
            loss.backward()
            if self.clip is not None:
                nn.utils.clip_grad_norm_(side.model.parameters(), self.clip)
            side.optimizer.step()
            if self.scheduler is not None:
                self.scheduler.step()
            total += loss.detach() * len(labels)
            samples += len(labels)
        mean = total.item() / samples
        return mean, perf_counter() - start, side.in_step - in_step

    def warm_up(self) -> None:
        for side, loss in ((self.ours, self.problem.loss), (self.twin, cross_entropy)):
            model, optimizer = copy.deepcopy((side.model, side.optimizer))
            for _, (images, labels) in zip(range(WARM_UP), self.batches(0), strict=False):
                loss(model(images), labels).backward()
                optimizer.step()

    # Events -----------------------------------------------------------------------------------------------------------

    def started(self, event: Started) -> None:
        if event.step:
            raise ValueError(f"argument --name: this run has made {event.step:,} updates already; give a new one")
        self.warm_up()
        if self.bar is not None:
            self.bar_task = self.bar.add_task("epochs", total=event.options.epochs)
            self.bar.start()
        self.line(self.head)
        columns = f"{'loss':>8}{'val loss':>10}{'val acc':>9}{'seconds':>9}"
        self.line("     " + "  ".join(f"{side.name:>36}" for side in (self.ours, self.twin)))
        self.line("epoch" + "  ".join([columns] * 2))
        self.resumed, self.step_seconds = perf_counter(), self.ours.in_step

    def progress(self, event: Progress) -> None:
        pass

    def validated(self, event: Validated) -> None:
        seconds = perf_counter() - event.seconds - self.resumed
        in_step = self.ours.in_step - self.step_seconds
        if len(self.ours.epochs) < event.epoch:
            self.ours.epochs.append(Epoch(event.train_loss, event.loss, event.metrics["accuracy"], seconds, in_step))
            loss, seconds, in_step = self.train_twin(self.batches(event.epoch - 1))
            self.twin.epochs.append(Epoch(loss, *self.held_out(), seconds, in_step))
            cells = [
                f"{e.loss:8.4f}{e.held_out_loss:10.4f}{e.accuracy:9.1%}{e.seconds:9.3f}"
                for e in (self.ours.epochs[-1], self.twin.epochs[-1])
            ]
            self.line(f"{event.epoch:5}" + "  ".join(cells))
            if self.bar is not None:
                self.bar.update(self.bar_task, advance=1, refresh=True)
        self.resumed, self.step_seconds = perf_counter(), self.ours.in_step

    def message(self, event: Message) -> None:
        self.line(f"step {event.step:,}  {event.kind}: {event.text}")

    def finished(self, event: Finished) -> None:
        if self.bar is not None:
            self.bar.stop()
        if event.reason == "finished" and self.twin.epochs:
            self.line(f"\n{self.summary()}")

    def held_out(self) -> tuple[float, float]:
        """Loss and accuracy of the twin on the held-out data."""
        images, labels = self.problem.validation
        with torch.no_grad():
            logits = self.twin.model(images)
            return cross_entropy(logits, labels).item(), float(self.problem.metrics["accuracy"](logits, labels))

    def summary(self) -> str:
        """Held-out accuracy, training time, and the optimizer's share of it, a column a side."""
        sides = (self.ours, self.twin)
        rows = [
            ("", [side.name for side in sides]),
            ("held-out accuracy", [f"{side.epochs[-1].accuracy:.1%}" for side in sides]),
            ("training, seconds", [f"{side.seconds():.3f}" for side in sides]),
            ("optimizer.step(), seconds", [f"{side.step_seconds():.3f}" for side in sides]),
            ("optimizer's share", [f"{side.step_seconds() / side.seconds():.1%}" for side in sides]),
        ]
        return "\n".join(f"{name:26}" + "".join(f"{cell:>19}" for cell in cells) for name, cells in rows)

    def line(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        print(text, flush=True)


def progress_bar() -> Any:
    """rich's progress bar without a thread of its own, or None where rich is not installed."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        return None
    console = Console()  # rich's own knows only whether there was a terminal when it was first asked for
    return Progress(*Progress.get_default_columns(), console=console, auto_refresh=False, transient=True)


def check(settings: SimpleNamespace) -> None:
    """ValueError for options that the twin's plain loop has not."""
    digits.check(settings)
    if options.OPTIMIZERS[settings.optimizer] not in (cls.__name__ for cls in registry.of_torch()):
        raise ValueError(f"argument --optimizer: {settings.optimizer}, but torch.optim has no such for a whole model")
    for key, value in COMPARED.items():
        if getattr(settings, key) != value:
            flag = key.replace("_", "-")
            raise ValueError(f"argument --{flag}: {getattr(settings, key)}, but the twin's plain loop has no --{flag}")


def reporter(problem: Problem, settings: SimpleNamespace, optimizer: Optimizer) -> Comparison:
    """The table of both twins."""
    total = setup.total_steps(problem, settings)
    settings.log_every = total // settings.epochs  # one mean loss an epoch
    settings.checkpoint_every = total  # what the twin does not do is no part of the run's time
    source = TensorSource(problem.data, settings.batch_size, settings.shuffle, Shard(), "data")

    def batches(epoch: int) -> Iterator[Any]:
        return (micro_batch.batch for micro_batch in source.epoch(settings.seed, epoch, 0))

    def stock(model: nn.Module) -> tuple[Optimizer, Any]:
        optimizer = setup.optimizer_of(replace(problem, model=model), settings, torch.optim)
        curve = setup.curve_of(problem, settings)
        scheduler = None if curve is None else torch.optim.lr_scheduler.LambdaLR(optimizer, curve)
        return optimizer, scheduler

    missing = "torch.optim has neither l1 nor noise: its run trains without them\n"
    head = missing if settings.l1 or settings.noise else ""
    return Comparison(problem, optimizer, stock, batches, settings.clip, head)


def main(arguments: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    experiment: Any = sys.modules[__name__]
    return train.run("python -m benchmarks.twin", "digits", experiment, given, reporter)


if __name__ == "__main__":
    sys.exit(main())
