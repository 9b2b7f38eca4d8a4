"""The options that every experiment has: those of the loop, `trainopt.training.Options`, and the command's own."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from trainopt.optim import registry
from trainopt.training import Options
from trainopt.training.fields import FLAG, FOLDER_NAME, TEXT, Option, choice, option, options_of, real, whole

OPTIMIZERS = {name.lower(): name for name in registry.every()}


def defaults_of(option: str) -> dict[str, Any]:
    """The default of an option, for each optimizer that has it: its class's own."""
    every = {short: inspect.signature(registry.every()[name]).parameters for short, name in OPTIMIZERS.items()}
    return {short: parameters[option].default for short, parameters in every.items() if option in parameters}


LEARNING_RATES = defaults_of("lr") | {"sgd": 0.1}  # torch's 0.001 would hardly move a small network
WEIGHT_DECAYS = defaults_of("weight_decay")
#: By options that not every optimizer has, those that do.
TAKING = {name: tuple(defaults_of(name)) for name in ("momentum", "weight_decay", "l1", "noise", "state_dtype")}
SCHEDULES = ("constant", "linear", "cosine", "wsd", "inverse-sqrt")

#: Of the loop's options, those that the command or the experiment decides.
SET = ("directory", "monitor", "maximize", "schedule_every", "sharded")
OF_THE_LOOP = tuple(field.name for field in fields(Options) if field.name not in SET)
#: Defaults of the command, where they are not the loop's.
DEFAULTS = {"batch_size": 64, "seed": 0}


@dataclass
class Optimizer:
    """What trains, and the course of its learning rate.

    Args:
        optimizer: what trains: sgd, adam, adamw, adamax, radam, nadam, rmsprop, adagrad, adadelta, adafactor, rprop,
            asgd, lion, lamb, lars, novograd, adan, ademamix, prodigy, adamwschedulefree, radamschedulefree,
            sgdschedulefree, or muon for hidden matrices with adamw for the rest.
        lr: learning rate. None: 0.1 for sgd, 0.001 for adam, adamw, radam, lamb, novograd, adan, ademamix and muon,
            0.002 for adamax and nadam, 0.01 for rmsprop, adagrad, adafactor, rprop and asgd, 0.0001 for lion, 1 for
            adadelta, lars, prodigy and sgdschedulefree, 0.0025 for the other schedule-free ones.
        momentum: momentum of sgd, rmsprop, lars, sgdschedulefree and muon; 0 with the full batch is gradient descent,
            but 0.9 for sgdschedulefree and 0.95 for muon.
        weight_decay: weight decay; biases and norms have none. None: 0.01 for adamw and lamb, 0.1 for muon, else 0.
        l1: factor of the L1 regularisation.
        noise: standard deviation of the noise added to each weight in an update.
        schedule: course after the warm-up: constant, linear, cosine, wsd or inverse-sqrt; wsd falls in the last fifth.
        warmup: updates in which the learning rate rises.
        floor: what linear, cosine and wsd fall to, a fraction of the learning rate.
    """

    optimizer: str = option("adam", choice(*OPTIMIZERS))
    lr: float | None = option(None, real(0))
    momentum: float = option(0.0, real(0, 1))
    weight_decay: float | None = option(None, real(0))
    l1: float = option(0.0, real(0))
    noise: float = option(0.0, real(0))
    schedule: str = option("constant", choice(*SCHEDULES))
    warmup: int = option(0, whole(0))
    floor: float = option(0.0, real(0, 1))


@dataclass
class Machine:
    """What computes.

    Args:
        device: auto, cpu or cuda; auto is cuda where there is one.
        threads: processor threads. None: as many as torch chooses.
    """

    device: str = option("auto", choice("auto", "cpu", "cuda"))
    threads: int | None = option(None, whole(1, os.cpu_count() or 1))


@dataclass
class Folder:
    """Where a run is written, and what else is made of it.

    Args:
        name: folder of the run; one with checkpoints is carried on. None: experiment, date and time.
        runs: folder of all runs.
        plot: draw the run's numbers into metrics.png.
        tensorboard: write event files for TensorBoard.
    """

    name: str | None = option(None, FOLDER_NAME)
    runs: str = option("runs", TEXT)
    plot: bool = option(False, FLAG)
    tensorboard: bool = option(False, FLAG)


def of_training() -> dict[str, tuple[Option, ...]]:
    """All that `trainopt train` takes beside an experiment's own, by title."""
    return {
        "training": (*options_of(Options, OF_THE_LOOP), *options_of(Machine)),
        "optimizer": options_of(Optimizer),
        "the run": options_of(Folder),
    }


def of_range_test() -> dict[str, tuple[Option, ...]]:
    """All that `trainopt lr-find` takes beside its own and an experiment's own, by title."""
    return {
        "training": (*options_of(Options, ("batch_size", "precision", "seed")), *options_of(Machine)),
        "optimizer": options_of(Optimizer, ("optimizer", "momentum", "weight_decay", "l1", "noise")),
    }


def with_defaults(
    groups: Mapping[str, tuple[Option, ...]], defaults: Mapping[str, Any]
) -> dict[str, tuple[Option, ...]]:
    """The same options, with an experiment's defaults. Of epochs and steps one is given, or else its default."""
    defaults = {**DEFAULTS, **defaults}

    def changed(each: Option) -> Option:
        if each.key not in defaults:
            return each
        value = defaults[each.key]
        if each.key in ("epochs", "steps"):
            return each._replace(shown=str(value))
        return each._replace(default=value)

    return {title: tuple(map(changed, options)) for title, options in groups.items()}
