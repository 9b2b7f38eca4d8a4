"""A picture of a run: loss and validation, learning rate, gradient norm."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainopt.training.folder import read_metrics

PICTURE = "metrics.png"


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
