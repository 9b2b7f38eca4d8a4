"""What a person sees of a run: a progress bar on a terminal, a line per interval anywhere else."""

from __future__ import annotations

import math
import sys
from typing import Any

from trainopt.training.report import Finished, Lines, Message, Progress, Report, Started, Validated


def console() -> Report:
    """`Terminal` where standard output is a terminal and rich is installed, else `Lines`."""
    if sys.stdout.isatty():
        try:
            return Terminal()
        except ImportError:
            pass
    return Lines()


class Terminal:
    """A bar with loss, learning rate, gradient norm, samples a second and time left; validations and messages above it.

    Drawn anew when there is news, without a thread: nothing draws while the model trains. ImportError without rich.
    """

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        self._lines = Lines()  # rich prints above the bar what goes to standard output
        self.bar: Any = Bar(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            auto_refresh=False,
            transient=True,
        )
        self._task: Any = None

    def started(self, event: Started) -> None:
        self._lines.started(event)
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

    def validated(self, event: Validated) -> None:
        self._lines.validated(event)

    def message(self, event: Message) -> None:
        self._lines.message(event)

    def finished(self, event: Finished) -> None:
        self.bar.stop()
        self._lines.finished(event)


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
