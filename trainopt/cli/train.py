"""`trainopt train`: an experiment through the reference loop, into a folder of its own."""

from __future__ import annotations

import importlib.util
import itertools
import shlex
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import torch

import trainopt
from trainopt import experiments
from trainopt.cli import options, setup
from trainopt.cli.refusals import Parser
from trainopt.cli.settings import read
from trainopt.experiments import Experiment, Problem
from trainopt.training import Options, Report, fit
from trainopt.training.distributed import Processes
from trainopt.training.fields import options_of
from trainopt.training.folder import Folder, plot
from trainopt.training.options import NOT_IN_BACKWARD
from trainopt.training.report import Several, TensorBoard, console
from trainopt.training.result import STATUS, Result

EXTRAS = {"plot": "matplotlib", "tensorboard": "tensorboard"}  # option: package


#: What makes the reporter of a run, called before anything has been trained.
Reporter = Callable[[Problem, SimpleNamespace, torch.optim.Optimizer], Report]


def main(name: str, arguments: Sequence[str]) -> int:
    """Trains the experiment of this name. The exit status: 0; 1 if it stopped since nothing was finite or the data are
    not there; 130 or 143 after SIGINT or SIGTERM; 2 for a bad option."""
    return run(f"trainopt train {name}", name, experiments.load(name), arguments, lambda *_: console())


def run(prog: str, name: str, experiment: Experiment, arguments: Sequence[str], reporter: Reporter) -> int:
    """Trains an experiment, and tells of it by a reporter; the exit status is that of `main`.

    Args:
        prog: what the person has called.
        name: of the folder, where the options give none, before date and time.
    """
    groups = {f"options of {name}": options_of(experiment.Options), **options.of_training()}
    groups = options.with_defaults(groups, experiment.DEFAULTS)
    settings, parser = read(arguments, prog, experiment.DESCRIPTION, groups)
    check(settings, experiment, parser)
    problem = setup.problem_of(experiment, settings, parser)
    is_named = settings.name is not None
    if not is_named:
        settings.name = new_name(Path(settings.runs), f"{name}-{datetime.now():%Y%m%d-%H%M%S}")
    folder = Folder(Path(settings.runs, settings.name), vars(settings))
    try:
        result = train(problem, settings, folder, reporter)
    except (ValueError, OSError) as error:
        if folder.is_started:
            raise
        parser.error(str(error))
    status = STATUS.get(result.reason, 1)
    if not Processes.join(torch.device(settings.device)).is_first:
        return status
    if settings.plot:
        print(f"drawn into {plot(folder.path)}")
    if result.reason in ("SIGINT", "SIGTERM"):
        again = ["trainopt", "train", name, *arguments, *([] if is_named else ["--name", settings.name])]
        print(f"carry on with: {shlex.join(again)}")
    elif result.reason in ("finished", "early stopping"):
        if result.average is not None and settings.early_stopping is None:  # with it, the model is the best average
            problem.model.load_state_dict(result.average)
        experiment.finish(problem, settings)
    return status


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
    for name, goes, why in NOT_IN_BACKWARD if settings.step_in_backward else ():
        if (value := getattr(settings, name)) not in goes:
            parser.error(f"argument --step-in-backward: it does not go with --{name} {value}: {why}")
    if settings.epochs and settings.steps:
        parser.error(f"argument --steps: {settings.steps}, and --epochs {settings.epochs}: give one of them")
    if not settings.epochs and not settings.steps:
        settings.epochs, settings.steps = (experiment.DEFAULTS.get(key) for key in ("epochs", "steps"))
    try:
        experiment.check(settings)
    except ValueError as error:
        parser.error(str(error))


def train(problem: Problem, settings: SimpleNamespace, folder: Folder, reporter: Reporter) -> Result:
    """Optimizer, schedule and reporters to the problem, and all of them to `fit`."""
    torch.manual_seed(settings.seed)
    optimizer = setup.optimizer_of(problem, settings)
    curve = setup.curve_of(problem, settings)
    schedule = None if curve is None else trainopt.Schedule(optimizer, lr=curve)
    reports = [reporter(problem, settings, optimizer), folder]
    if settings.tensorboard:
        reports.append(TensorBoard(folder.path / "tensorboard"))
    choices = Options(directory=folder.path, **{key: getattr(settings, key) for key in options.OF_THE_LOOP})
    if Processes.join(torch.device(settings.device)).is_first:
        print(f"{problem.title}\n{setup.outline(optimizer, settings)}; into {folder.path}", flush=True)
    return fit(
        problem.model,
        problem.data,
        problem.loss,
        optimizer,
        choices,
        validation=problem.validation,
        metrics=problem.metrics,
        count=problem.count,
        schedule=schedule,
        report=Several(*reports),
    )
