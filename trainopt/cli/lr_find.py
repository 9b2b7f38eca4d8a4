"""`trainopt lr-find`: the range test on an experiment."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch

from trainopt import experiments
from trainopt.cli import options, setup
from trainopt.cli.settings import Option, read, real, whole
from trainopt.training.lr_find import LrCurve, lr_find

OPTIONS = (
    Option("lowest", "first learning rate", 1e-6, real(0, above=True), "X"),
    Option("highest", "last learning rate", 10.0, real(0, above=True), "X"),
    Option("updates", "from one to the other", 100, whole(2), "N"),
    Option("plot", "file for a picture of the curve, such as curve.png", None, str, "FILE"),
)
AFTER_TRAINING = ("compare", "sample", "temperature")  # options that say nothing to the test
BAR = 40  # characters


def main(name: str, arguments: Sequence[str]) -> int:
    """Prints the curve and the suggestion for the experiment of this name; nothing is trained or kept."""
    experiment = experiments.load(name)
    rule = tuple(option for option in options.OPTIMIZER if option.name != "lr")
    own = tuple(option for option in experiment.OPTIONS if option.name not in AFTER_TRAINING)
    settings, parser = read(
        arguments,
        f"trainopt lr-find {name}",
        f"Let the learning rate grow from update to update, and see where the loss falls. {experiment.DESCRIPTION}",
        {
            "range test": OPTIONS,
            f"options of {name}": own,
            "training": options.with_defaults(options.BATCHES, experiment.DEFAULTS),
            "optimizer": options.with_defaults(rule, experiment.DEFAULTS),
        },
    )
    settings.lr = 1.0  # the test sets it
    for option in set(experiment.OPTIONS) - set(own):
        setattr(settings, option.key, option.default)
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
    task = setup.task_of(experiment, settings, parser)
    torch.manual_seed(settings.seed)
    try:
        curve = lr_find(
            task.model,
            task.data,
            task.loss,
            setup.optimizer_of(task, settings),
            lowest=settings.lowest,
            highest=settings.highest,
            steps=settings.updates,
            batch_size=settings.batch_size,
            precision=settings.precision,
            seed=settings.seed,
        )
    except ValueError as error:
        parser.error(str(error))
    print(f"{task.title}\n{table(curve)}\n\n{curve}")
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
