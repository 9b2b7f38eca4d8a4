"""The options that every experiment has, by what they are about."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from trainopt.cli.settings import Option, choice, folder_name, real, whole, word_or
from trainopt.training.options import NONFINITE, PRECISIONS

OPTIMIZERS = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW"}
LEARNING_RATES = {"sgd": 0.1, "adam": 0.001, "adamw": 0.001}
WEIGHT_DECAYS = {"sgd": 0.0, "adam": 0.0, "adamw": 0.01}
SCHEDULES = ("constant", "linear", "cosine", "wsd", "inverse-sqrt")
DEVICES = ("auto", "cpu", "cuda")

OPTIMIZER = (
    Option("optimizer", "rule that trains: sgd, adam or adamw", "adam", choice(*OPTIMIZERS), "NAME"),
    Option("lr", "learning rate", None, real(0), "X", "0.1 for sgd, 0.001 for adam and adamw"),
    Option("momentum", "momentum of sgd; 0 with the full batch is gradient descent", 0.0, real(0, 1), "X"),
    Option("weight-decay", "weight decay; biases and norms have none", None, real(0), "X", "0.01 for adamw, else 0"),
    Option("l1", "factor of the L1 regularisation", 0.0, real(0), "X"),
    Option("noise", "standard deviation of the noise added to each weight in an update", 0.0, real(0), "X"),
)
SCHEDULE = (
    Option(
        "schedule",
        f"course of the learning rate after the warm-up: {', '.join(SCHEDULES)}; wsd falls in the last fifth",
        "constant",
        choice(*SCHEDULES),
        "NAME",
    ),
    Option("warmup", "updates in which the learning rate rises", 0, whole(0), "N"),
    Option("floor", "what linear, cosine and wsd fall to, a fraction of the learning rate", 0.0, real(0, 1), "X"),
)
BATCHES = (
    Option("batch-size", "samples in a micro-batch; full: all of them", 64, word_or("full", whole(1)), "N|full"),
    Option(
        "precision", f"{', '.join(PRECISIONS)}; the last two under autocast", "float32", choice(*PRECISIONS), "NAME"
    ),
    Option("device", "auto, cpu or cuda; auto: cuda where there is one", "auto", choice(*DEVICES), "NAME"),
    Option("threads", "processor threads", None, whole(1, os.cpu_count() or 1), "N", "torch's own choice"),
    Option("seed", "of the split, weights, order, noise and dropout", 0, whole(0, 2**63 - 1), "N"),
)
TRAINING = (
    Option("epochs", "passes over the training data; give these or the steps", None, whole(1), "N"),
    Option("steps", "updates of the weights", None, whole(1), "N"),
    Option("accumulation", "micro-batches in an update", 1, whole(1), "N"),
    Option("clip", "largest global norm of the gradient", None, real(0, above=True), "X"),
    Option("average", "decay of the moving average of the weights, which is then evaluated", None, real(0, 1), "X"),
    Option("validate-every", "updates between validations", None, whole(1), "N", "an epoch"),
    Option("early-stopping", "validations without a new best before the run stops", None, whole(1), "N", "never"),
    Option("nonfinite", f"if a gradient is not finite: {', '.join(NONFINITE)}", "skip", choice(*NONFINITE), "NAME"),
)
RUN = (
    Option("name", "folder of the run; one with checkpoints is carried on", None, folder_name, "NAME", "date and time"),
    Option("runs", "folder of all runs", "runs", str, "DIR"),
    Option("resume", "carry on from the newest checkpoint of this name", True),
    Option("checkpoint-every", "updates between checkpoints", None, whole(1), "N", "one at every validation"),
    Option("checkpoint-minutes", "minutes after which there is one in any case", 10.0, real(0, above=True), "X"),
    Option("keep", "checkpoints kept, the newest ones", 3, whole(1), "N"),
    Option("log-every", "updates between two lines of numbers", 50, whole(1), "N"),
    Option("plot", "draw the run's numbers into metrics.png", False),
    Option("tensorboard", "write event files for TensorBoard", False),
)


def with_defaults(options: tuple[Option, ...], defaults: Mapping[str, Any]) -> tuple[Option, ...]:
    """The same options, with other defaults for those named. Of epochs and steps one is given, or else the default."""
    changed = []
    for option in options:
        if option.name in defaults:
            value = defaults[option.name]
            is_length = option.name in ("epochs", "steps")
            option = replace(option, default=None if is_length else value, shown=str(value) if is_length else None)
        changed.append(option)
    return tuple(changed)
