"""What a run tells the world: five events, and the plain lines that say them.

A reporter is any object with the five methods of `Report`. Only the first of several processes speaks. All numbers are
plain Python numbers: whoever receives an event touches no device.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO

from trainopt.training.options import Options


@dataclass(frozen=True)
class Started:
    """A run begins, or carries on from a checkpoint."""

    options: Options
    model: str  # the class of the model
    parameters: int  # trainable elements
    optimizer: str  # the class of the optimizer
    device: str
    processes: int
    step: int  # updates made before: 0, or those of the checkpoint; what a log holds beyond them is made anew
    total_steps: int | None  # updates of the whole run; None where the data has no length
    resumed_from: Path | None


@dataclass(frozen=True)
class Progress:
    """Every `log_every` updates, and after the last one."""

    step: int  # updates made
    total_steps: int | None
    epoch: int  # passes over the data completed
    loss: float  # mean over what the loss counts, since the last such event
    lr: float  # of the first parameter group, as this update used it
    grad_norm: float | None  # of the last update's gradient: unscaled, before clipping; None where it was not computed
    samples_per_second: float  # training alone, since the last such event
    seconds: float  # since the run began
    seconds_left: float | None  # None where the number of steps is not known
    skipped: int  # updates skipped so far because something was not finite
    #: Norm of the last update against the weights' before it; None where the step did not tell: with an optimizer other
    #: than trainopt's, or not on the CPU. A thousandth is usual.
    update_ratio: float | None = None


@dataclass(frozen=True)
class Validated:
    """The model has been evaluated on the validation data."""

    step: int
    epoch: int
    loss: float
    metrics: Mapping[str, float]
    train_loss: float  # of the latest interval; NaN before the first
    is_best: bool  # the best value of `monitor` so far
    on_average: bool  # measured on the moving average of the weights
    seconds: float  # that it took


@dataclass(frozen=True)
class Message:
    """A sentence for the person.

    `kind` is "info", "warning" (something to look into) or "trouble"; `numbers` are those of the text.
    """

    step: int
    kind: str
    topic: str  # "loss", "overfitting", "nonfinite", "checkpoint", "resume", "count" or "stop"
    text: str
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Finished:
    """The run has ended; the last event, also of a run that was interrupted."""

    step: int
    epoch: int
    reason: str  # "finished", "early stopping", "nonfinite", "SIGTERM", "SIGINT", or the name of an exception
    loss: float  # of the last interval
    best: float | None  # the best value of `monitor`; None without validation
    best_step: int | None
    seconds: float
    samples: int  # trained on by this process group since it started
    checkpoint: Path | None  # the newest whole one


class Report(Protocol):
    """Receives what happens, in order. An exception that it raises ends the run like any other."""

    def started(self, event: Started) -> None: ...

    def progress(self, event: Progress) -> None: ...

    def validated(self, event: Validated) -> None: ...

    def message(self, event: Message) -> None: ...

    def finished(self, event: Finished) -> None: ...


class Silent:
    """Says nothing."""

    def started(self, event: Started) -> None:
        pass

    def progress(self, event: Progress) -> None:
        pass

    def validated(self, event: Validated) -> None:
        pass

    def message(self, event: Message) -> None:
        pass

    def finished(self, event: Finished) -> None:
        pass


class Lines:
    """A line an event, without colour or cursor movement.

    Args:
        stream: where to; standard output by default.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream

    def started(self, event: Started) -> None:
        total = "" if event.total_steps is None else f" of {event.total_steps:,}"
        where = f" after step {event.step:,}{total}, from {event.resumed_from}" if event.resumed_from else ""
        self._line(
            f"{'carrying on' if where else 'training'} {event.model} ({event.parameters:,} parameters) with "
            f"{event.optimizer} on {event.device}{where}"
        )

    def progress(self, event: Progress) -> None:
        norm = "" if event.grad_norm is None else f"  |grad| {event.grad_norm:.3g}"
        left = "" if event.seconds_left is None else f"  {event.seconds_left:.0f} s left"
        self._line(
            f"step {event.step:,}  epoch {event.epoch}  loss {event.loss:.4f}  lr {event.lr:.3g}{norm}  "
            f"{event.samples_per_second:,.0f} samples/s{left}"
        )

    def validated(self, event: Validated) -> None:
        metrics = "".join(f"  {name} {value:.4g}" for name, value in event.metrics.items())
        best = "  (best)" if event.is_best else ""
        self._line(f"step {event.step:,}  validation loss {event.loss:.4f}{metrics}{best}")

    def message(self, event: Message) -> None:
        self._line(f"step {event.step:,}  {event.kind}: {event.text}")

    def finished(self, event: Finished) -> None:
        best = "" if event.best is None else f"; best {event.best:.4g} at step {event.best_step:,}"
        self._line(f"{event.reason} after step {event.step:,} and {event.seconds:.1f} s: loss {event.loss:.4f}{best}")

    def _line(self, text: str) -> None:
        print(text, file=self._stream or sys.stdout, flush=True)


def console() -> Report:
    """`Terminal` where standard output is a terminal and rich is installed, else `Lines`."""
    if sys.stdout.isatty():
        try:
            return Terminal()
        except ImportError:
            pass
    return Lines()


class Terminal(Lines):
    """A bar with loss, learning rate, gradient norm, samples a second and time left; validations and messages above it.

    Drawn anew when there is news, without a thread: nothing draws while the model trains. ImportError without rich.
    """

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        super().__init__()  # rich prints above the bar what goes to standard output
        self.bar: Any = Bar(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=Console(),  # rich's own knows only whether there was a terminal when it was first asked for
            auto_refresh=False,
            transient=True,
        )
        self._task: Any = None

    def started(self, event: Started) -> None:
        super().started(event)
        self._task = self.bar.add_task("step", total=event.total_steps, completed=event.step, numbers="")
        self.bar.start()

    def progress(self, event: Progress) -> None:
        parts = [f"loss {event.loss:.4f}", f"lr {event.lr:.3g}"]
        if event.grad_norm is not None:
            parts.append(f"|grad| {event.grad_norm:.3g}")
        parts.append(f"{event.samples_per_second:,.0f} samples/s")
        if event.seconds_left is not None:
            parts.append(f"{duration(event.seconds_left)} left")
        if event.skipped:
            parts.append(f"{event.skipped} skipped")
        self.bar.update(self._task, completed=event.step, numbers="  ".join(parts), refresh=True)

    def finished(self, event: Finished) -> None:
        self.bar.stop()
        super().finished(event)


class Several:
    """Hands every event on to several reporters, in order."""

    def __init__(self, *reports: Report) -> None:
        self.reports = reports

    def started(self, event: Started) -> None:
        for report in self.reports:
            report.started(event)

    def progress(self, event: Progress) -> None:
        for report in self.reports:
            report.progress(event)

    def validated(self, event: Validated) -> None:
        for report in self.reports:
            report.validated(event)

    def message(self, event: Message) -> None:
        for report in self.reports:
            report.message(event)

    def finished(self, event: Finished) -> None:
        for report in self.reports:
            report.finished(event)


def duration(seconds: float) -> str:
    """As 42 s, 7:05 or 2:07:05."""
    whole = math.ceil(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class TensorBoard:
    """A reporter that writes event files for ``tensorboard --logdir``.

    Args:
        path: the folder for them.

    Raises:
        ImportError: the package tensorboard is not installed (``pip install 'trainopt[tensorboard]'``).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._make: Any = SummaryWriter
        self._path = os.fspath(path)
        self._writer: Any = None

    def started(self, event: Started) -> None:
        # What an interrupted run wrote after the checkpoint is hidden by the new one.
        self._writer = self._make(self._path, purge_step=event.step + 1 if event.step else None)

    def progress(self, event: Progress) -> None:
        numbers = {
            "loss/training": event.loss,
            "learning rate": event.lr,
            "gradient norm": event.grad_norm,
            "update to weights": event.update_ratio,
            "samples per second": event.samples_per_second,
        }
        for name, number in numbers.items():
            if number is not None:
                self._writer.add_scalar(name, number, event.step)

    def validated(self, event: Validated) -> None:
        self._writer.add_scalar("loss/validation", event.loss, event.step)
        for name, number in event.metrics.items():
            self._writer.add_scalar(name, number, event.step)

    def message(self, event: Message) -> None:
        self._writer.add_text(event.topic, event.text, event.step)

    def finished(self, event: Finished) -> None:
        if self._writer is not None:
            self._writer.close()
