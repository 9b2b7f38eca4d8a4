"""`trainopt lr-find`: the range test on an experiment."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from trainopt import experiments
from trainopt.cli import options, setup
from trainopt.cli.settings import read
from trainopt.training.fields import TEXT, option, options_of, real, whole
from trainopt.training.lr_find import LrCurve, lr_find


@dataclass
class RangeTest:
    """The range test's own options.

    Args:
        lowest: first learning rate.
        highest: last learning rate.
        updates: updates from one to the other.
        plot: file for a picture of the curve, such as curve.png.
    """

    lowest: float = option(1e-6, real(0, above=True))
    highest: float = option(10.0, real(0, above=True))
    updates: int = option(100, whole(2))
    plot: str | None = option(None, TEXT)


AFTER_TRAINING = ("sample", "temperature")  # options that say nothing to the test
BAR = 40  # characters


def main(name: str, arguments: Sequence[str]) -> int:
    """Prints the curve and the suggestion for the experiment of this name; nothing is trained or kept."""
    experiment = experiments.load(name)
    every = options_of(experiment.Options)
    own = tuple(each for each in every if each.key not in AFTER_TRAINING)
    settings, parser = read(
        arguments,
        f"trainopt lr-find {name}",
        f"Let the learning rate grow from update to update, and see where the loss falls. {experiment.DESCRIPTION}",
        options.with_defaults(
            {"range test": options_of(RangeTest), f"options of {name}": own, **options.of_range_test()},
            experiment.DEFAULTS,
        ),
    )
    settings.lr = 1.0  # the test sets it
    for each in set(every) - set(own):
        setattr(settings, each.key, each.default)
    setup.check(settings, parser)
    if settings.lowest >= settings.highest:
        parser.error(f"argument --lowest: {settings.lowest:g} is not less than --highest {settings.highest:g}")
    if settings.plot:
        if importlib.util.find_spec("matplotlib") is None:
            parser.error("argument --plot: matplotlib is not installed: pip install 'trainopt[plot]'")
        if not Path(settings.plot).resolve().parent.is_dir():
            parser.error(f"argument --plot: the folder of {settings.plot!r} does not exist")
    try:
        experiment.check(settings)
    except ValueError as error:
        parser.error(str(error))
    problem = setup.problem_of(experiment, settings, parser)
    torch.manual_seed(settings.seed)
    try:
        curve = lr_find(
            problem.model,
            problem.data,
            problem.loss,
            setup.optimizer_of(problem, settings),
            lowest=settings.lowest,
            highest=settings.highest,
            steps=settings.updates,
            batch_size=settings.batch_size,
            precision=settings.precision,
            seed=settings.seed,
        )
    except ValueError as error:
        parser.error(str(error))
    print(f"{problem.title}\n{table(curve)}\n\n{curve}")
    if settings.plot:
        curve.plot(settings.plot)
        print(f"drawn into {settings.plot}")
    return 0


def table(curve: LrCurve, rows: int = 20) -> str:
    """Learning rates, smoothed losses, and bars that are as long as the loss is large."""
    stride = max(1, -(-len(curve.rates) // rows))
    top = max(curve.smoothed)
    lines = [f"{'lr':>10}{'loss':>12}"]
    for rate, loss in list(zip(curve.rates, curve.smoothed, strict=True))[::stride]:
        bar = "#" * round(BAR * max(loss, 0) / top) if top > 0 else ""
        lines.append(f"{rate:10.2e}{loss:12.4f}  {bar}".rstrip())
    return "\n".join(lines)
