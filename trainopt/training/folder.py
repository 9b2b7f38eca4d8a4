"""The folder of a run: what it was told to do, its numbers as they come, and a picture of them."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from trainopt._version import __version__
from trainopt.training.checkpoint import replacing
from trainopt.training.report import Finished, Message, Progress, Report, Several, Started, Validated

CONFIG, METRICS, PICTURE = "config.json", "metrics.jsonl", "metrics.png"


class Folder:
    """A reporter that writes `config.json` (options, model, versions) and `metrics.jsonl` (one event a line).

    A run that carries on from a checkpoint drops the lines that its predecessor wrote after that: they are made anew.
    What cannot be written (a full disk) is lost with a word on standard error, and the run goes on. Numbers that are
    not finite are null.

    Args:
        path: the folder; made, with those above it, when the run starts.
        settings: what else config.json is to say, as JSON knows it.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any] | None = None) -> None:
        self.path = Path(path)
        self._settings = dict(settings or {})
        self.is_started = False
        self._lost = 0

    def started(self, event: Started) -> None:
        config = {
            "settings": self._settings,
            "options": event.options.plain(),
            "model": event.model,
            "parameters": event.parameters,
            "optimizer": event.optimizer,
            "device": event.device,
            "processes": event.processes,
            "total_steps": event.total_steps,
            "versions": {
                "trainopt": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "threads": torch.get_num_threads(),
        }
        self.is_started = True
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.path / CONFIG, json.dumps(finite(config), indent=2) + "\n")
            entries = read_metrics(self.path) if event.step else []
            kept = [entry for entry in entries if entry.get("step", math.inf) <= event.step]
            write_text(self.path / METRICS, "".join(map(line_of, kept)))
        except OSError as error:
            self._lose(self.path, error)

    def progress(self, event: Progress) -> None:
        self._write("progress", event)

    def validated(self, event: Validated) -> None:
        self._write("validated", event)

    def message(self, event: Message) -> None:
        self._write("message", event)

    def finished(self, event: Finished) -> None:
        if self.is_started:  # a run that was refused leaves nothing behind
            self._write("finished", event)

    def _write(self, kind: str, event: Any) -> None:
        try:
            with open(self.path / METRICS, "a", encoding="utf-8") as file:
                file.write(line_of({"event": kind, **asdict(event)}))
        except OSError as error:
            self._lose(self.path / METRICS, error)

    def _lose(self, path: Path, error: OSError) -> None:
        self._lost += 1
        if self._lost == 1:
            print(f"warning: {path} loses what is told: {error.strerror}", file=sys.stderr)


def with_folder(report: Report, directory: Path) -> Report:
    """A report that writes to the run's directory too, unless it does already."""
    reports = report.reports if isinstance(report, Several) else (report,)
    if any(isinstance(each, Folder) and each.path.resolve() == directory.resolve() for each in reports):
        return report
    return Several(*reports, Folder(directory))


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The events in a run's folder, in order. A line that was cut off, or is no event, is left out."""
    file = Path(path) / METRICS
    entries = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []:
        try:
            entry = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            continue
        if isinstance(entry, dict):
            entries.append(entry)
    return entries


def line_of(entry: Mapping[str, Any]) -> str:
    return json.dumps(finite(entry)) + "\n"


def finite(value: Any) -> Any:
    """The value as strict JSON has it: numbers that are not finite are None, paths are text."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    with replacing(path) as file:
        file.write(text.encode())


def figure(size: tuple[float, float]) -> Any:
    """An empty figure of matplotlib, of this size in inches; no window is opened. ImportError without matplotlib."""
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def plot(path: str | os.PathLike[str]) -> Path:
    """Draws the numbers in a run's folder into its `metrics.png`, and returns that.

    Raises:
        ImportError: matplotlib is not installed (``pip install 'trainopt[plot]'``).
        ValueError: there are no numbers in the folder yet.
    """
    entries = read_metrics(path)
    progress = [entry for entry in entries if entry["event"] == "progress"]
    validated = [entry for entry in entries if entry["event"] == "validated"]
    if not progress:
        raise ValueError(f"there are no numbers to draw in {path}")
    picture = figure((8, 8))
    loss, rate, norm = picture.subplots(3, 1, sharex=True, height_ratios=[2, 1, 1])
    curve(loss, progress, "loss", "training")
    if validated:
        curve(loss, validated, "loss", "validation", marker="o")
    loss.set_ylabel("loss")
    loss.legend()
    curve(rate, progress, "lr", "learning rate")
    rate.set_ylabel("learning rate")
    curve(norm, progress, "grad_norm", "gradient norm")
    norm.set_ylabel("gradient norm")
    norm.set_xlabel("updates")
    for axes in (loss, rate, norm):
        axes.grid(alpha=0.3)
    loss.set_title(Path(path).name)
    target = Path(path) / PICTURE
    picture.savefig(target, dpi=120)
    return target


def curve(axes: Any, entries: Sequence[dict[str, Any]], key: str, label: str, **style: Any) -> None:
    """Draws one number of the events over the steps, with gaps where it was not finite."""
    values = [math.nan if entry[key] is None else entry[key] for entry in entries]
    axes.plot([entry["step"] for entry in entries], values, label=label, **style)
