"""`trainopt train`: an experiment through the reference loop, into a folder of its own."""

from __future__ import annotations

import importlib.util
import itertools
import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import torch

import trainopt
from trainopt import experiments
from trainopt.cli import options, setup
from trainopt.cli.settings import Parser, read
from trainopt.experiments import Experiment, Task
from trainopt.training import Options, fit
from trainopt.training.folder import Folder
from trainopt.training.loop import STATUS, Result
from trainopt.training.report import Several, console

#: What goes to `Options` as it is.
PASSED_ON = (
    *("epochs", "steps", "batch_size", "accumulation", "precision", "clip", "average", "validate_every"),
    *("early_stopping", "nonfinite", "resume", "checkpoint_every", "checkpoint_minutes", "keep", "log_every", "seed"),
)
EXTRAS = {"plot": "matplotlib", "tensorboard": "tensorboard"}  # option: package


def main(name: str, arguments: Sequence[str]) -> int:
    """Trains the experiment of this name. The exit status: 0; 1 if it stopped since nothing was finite or the data are
    not there; 130 or 143 after SIGINT or SIGTERM; 2 for a bad option."""
    experiment = experiments.load(name)
    settings, parser = read(
        arguments,
        f"trainopt train {name}",
        experiment.DESCRIPTION,
        {
            f"options of {name}": experiment.OPTIONS,
            "training": options.with_defaults(options.TRAINING + options.BATCHES, experiment.DEFAULTS),
            "optimizer": options.with_defaults(options.OPTIMIZER + options.SCHEDULE, experiment.DEFAULTS),
            "the run": options.with_defaults(options.RUN, experiment.DEFAULTS),
        },
    )
    check(settings, experiment, parser)
    task = setup.task_of(experiment, settings, parser)
    is_named = settings.name is not None
    if not is_named:
        settings.name = new_name(Path(settings.runs), f"{name}-{datetime.now():%Y%m%d-%H%M%S}")
    folder = Folder(Path(settings.runs, settings.name), vars(settings))
    try:
        result = train(experiment, task, settings, folder)
    except (ValueError, OSError) as error:
        if folder.is_started:
            raise
        parser.error(str(error))
    if not setup.is_first():
        return STATUS.get(result.reason, 1)
    if settings.plot:
        from trainopt.training.folder import plot

        print(f"drawn into {plot(folder.path)}")
    if result.reason in ("SIGINT", "SIGTERM"):
        again = ["trainopt", "train", name, *arguments, *([] if is_named else ["--name", settings.name])]
        again += ["--no-compare"] if getattr(settings, "compare", False) else []  # the twin has no checkpoints
        print(f"carry on with: {shlex.join(again)}")
    elif result.reason in ("finished", "early stopping"):
        if result.average is not None and settings.early_stopping is None:  # with it, the model is the best average
            task.model.load_state_dict(result.average)
        experiment.finish(task, settings)
    return STATUS.get(result.reason, 1)


def new_name(runs: Path, name: str) -> str:
    """This name, or one with a number where a run has it already."""
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(candidate for candidate in names if not (runs / candidate).exists())


def check(settings: SimpleNamespace, experiment: Experiment, parser: Parser) -> None:
    """Ends the program for options that do not go together, before any data is read."""
    setup.check(settings, parser)
    for option, package in EXTRAS.items():
        if getattr(settings, option) and importlib.util.find_spec(package) is None:
            parser.error(f"argument --{option}: {package} is not installed: pip install 'trainopt[{option}]'")
    if settings.epochs and settings.steps:
        parser.error(f"argument --steps: {settings.steps}, and --epochs {settings.epochs}: give one of them")
    if not settings.epochs and not settings.steps:
        settings.epochs, settings.steps = (experiment.DEFAULTS.get(key) for key in ("epochs", "steps"))
    try:
        experiment.check(settings)
    except ValueError as error:
        parser.error(str(error))


def train(experiment: Experiment, task: Task, settings: SimpleNamespace, folder: Folder) -> Result:
    """Optimizer, schedule and reporters to the task, and all of them to `fit`."""
    torch.manual_seed(settings.seed)
    optimizer = setup.optimizer_of(task, settings)
    curve = setup.curve_of(task, settings)
    schedule = None if curve is None else trainopt.Schedule(optimizer, lr=curve)
    reports = [experiment.reporter(task, settings, optimizer) or console(), folder]
    if settings.tensorboard:
        from trainopt.training.report import TensorBoard

        reports.append(TensorBoard(folder.path / "tensorboard"))
    choices = Options(directory=folder.path, **{key: getattr(settings, key) for key in PASSED_ON})
    if setup.is_first():
        print(f"{task.title}\n{setup.outline(optimizer, settings)}; into {folder.path}", flush=True)
    return fit(
        task.model,
        task.data,
        task.loss,
        optimizer,
        choices,
        validation=task.validation,
        metrics=task.metrics,
        count=task.count,
        schedule=schedule,
        report=Several(*reports),
    )
