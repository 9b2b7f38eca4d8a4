"""What a run tells the world: five events, and the plain lines that say them.

A reporter is any object with the five methods of `Report`. Only the first of several processes speaks. All numbers are
plain Python numbers: whoever receives an event touches no device.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TextIO

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


@dataclass(frozen=True)
class Validated:
    """The validation data has been gone through."""

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
    samples: int  # gone through by this process group since it started
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
