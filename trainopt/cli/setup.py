"""From options to objects: what `trainopt train` and `trainopt lr-find` both need."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any

import torch

import trainopt
from trainopt.cli.options import LEARNING_RATES, OPTIMIZERS, TAKING, WEIGHT_DECAYS
from trainopt.cli.refusals import Parser
from trainopt.experiments import Experiment, Problem
from trainopt.schedules import Curve, constant, cosine, inverse_sqrt, linear, warmup, warmup_stable_decay
from trainopt.training import Options


def check(settings: SimpleNamespace, parser: Parser) -> None:
    """Ends the program for options of the optimizer and the machine that do not go together."""
    for name, known in TAKING.items():
        if (value := getattr(settings, name, None)) and settings.optimizer not in known:
            lacking = [short for short in OPTIMIZERS if short not in known]
            whose = f"every --optimizer but {' or '.join(lacking)}"
            if len(known) < len(lacking):
                whose = f"--optimizer {' or '.join(known)}, not {settings.optimizer}"
            shown = value if isinstance(value, str) else f"{value:g}"
            parser.error(f"argument --{name.replace('_', '-')}: {shown} is for {whose}")
    if settings.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: 'cuda' is not there: torch finds no such device")
    if settings.lr is None:
        settings.lr = LEARNING_RATES[settings.optimizer]
    if settings.weight_decay is None:
        settings.weight_decay = WEIGHT_DECAYS.get(settings.optimizer, 0.0)
    if settings.device == "auto":
        settings.device = "cuda" if torch.cuda.is_available() else "cpu"


def problem_of(experiment: Experiment, settings: SimpleNamespace, parser: Parser) -> Problem:
    """The experiment's data and model, this on its device; ends the program where the data are not to be had."""
    try:
        problem = experiment.make(settings)
    except ValueError as error:
        parser.error(str(error))
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    if settings.batch_size != "full" and settings.batch_size > len(problem.data[0]):
        parser.error(
            f"argument --batch-size: {settings.batch_size} is more than the {len(problem.data[0]):,} samples to train "
            "on; 'full' takes them all at once"
        )
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    if settings.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    problem.model.to(settings.device)
    return problem


def optimizer_of(problem: Problem, settings: SimpleNamespace, library: Any = trainopt) -> torch.optim.Optimizer:
    """The optimizer of a library, trainopt or torch.optim; what torch does not know is left out for it."""
    cls = getattr(library, OPTIMIZERS[settings.optimizer])
    keywords = {"lr": settings.lr}
    if settings.momentum:  # 0 is the default of all but the schedule-free SGD and Muon, which have another
        keywords["momentum"] = settings.momentum
    if cls is trainopt.Muon:
        # One rate and decay for matrices and the rest: so matrices need updates as large as AdamW's.
        keywords.update(weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw")
        rest = {"lr": settings.lr, "weight_decay": settings.weight_decay}
        return cls(trainopt.muon_groups(problem.model), **keywords, adamw=rest)
    if library is trainopt:
        keywords.update(l1=settings.l1, noise=settings.noise, seed=settings.seed)
    return cls(trainopt.param_groups(problem.model, settings.weight_decay), **keywords)


def total_steps(problem: Problem, settings: SimpleNamespace) -> int:
    """Updates of the whole run."""
    batches = 1 if settings.batch_size == "full" else -(-len(problem.data[0]) // settings.batch_size)
    options = Options(epochs=settings.epochs, steps=settings.steps, accumulation=settings.accumulation)
    total = options.total_steps(batches)
    assert total is not None
    return total


def curve_of(problem: Problem, settings: SimpleNamespace) -> Curve | None:
    """The course of the learning rate, None if it has none. ValueError if the warm-up is as long as the run.

    With a floor the last update is made at the floor; a rate that falls to 0 gets there after it.
    """
    total = total_steps(problem, settings)
    if settings.warmup >= total:
        raise ValueError(f"argument --warmup: {settings.warmup} is not less than the {total} updates of the run")
    if settings.schedule == "constant" and not settings.warmup:
        return None
    end = total - 1 if settings.floor else total
    rise = warmup(settings.warmup)
    if settings.schedule == "wsd":
        return warmup_stable_decay(end, settings.warmup, min(total // 5, end - settings.warmup), floor=settings.floor)
    return rise.then(
        {
            "constant": constant(),
            "linear": linear(end, end=settings.floor),
            "cosine": cosine(end, floor=settings.floor),
            "inverse-sqrt": inverse_sqrt(max(settings.warmup, 1)),
        }[settings.schedule]
    )


def outline(optimizer: torch.optim.Optimizer, settings: SimpleNamespace) -> str:
    """The optimizer and what was chosen for it, in a line."""
    shown = ["lr", *(name for name in ("momentum", "weight_decay", "l1", "noise") if getattr(settings, name))]
    chosen = ", ".join(f"{name} {getattr(settings, name):g}" for name in shown)
    return f"{type(optimizer).__name__}: {chosen}; seed {settings.seed}; threads {torch.get_num_threads()}"
