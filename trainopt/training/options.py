"""Everything about a run that is a choice and not an object: checked once, at construction."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

PRECISIONS = ("float32", "bfloat16", "float16")
NONFINITE = ("skip", "stop", "ignore")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a run does. ValueError with the option's name and value where a value makes no sense.

    Args:
        epochs: passes over the training data. Give this or `steps`.
        steps: updates of the weights.
        batch_size: samples in a micro-batch, over all processes, where the data are plain tensors; "full" for all of
            them (gradient descent). A DataLoader has its own.
        shuffle: whether plain tensors are gone through in a new random order each epoch. A DataLoader decides itself.
        accumulation: micro-batches in one update. The gradient is that of the mean over all that the loss counts in
            them, as if they were one batch. At the end of an epoch an update may have fewer.
        precision: "float32", or the type that autocast computes in: "bfloat16", or "float16" with a GradScaler.
        clip: largest global norm of the gradient; a longer one is scaled down to it. None: no clipping.
        average: decay of the moving average of the weights, in [0, 1); evaluation is then on the average. None: none.
        average_warmup: whether the decay starts small (`trainopt.training.average`).
        validate_every: updates between validations. None: after every epoch.
        early_stopping: validations without a new best after which the run stops. None: never.
        monitor: what decides on the best weights: "loss" (of validation) or the name of a metric.
        maximize: whether a larger value of `monitor` is better.
        directory: folder of the run, made if need be; checkpoints go into its folder "checkpoints". None: no
            checkpoints.
        checkpoint_every: updates between checkpoints; there is one at the end too.
        keep: how many checkpoints are kept, the newest ones.
        resume: whether to carry on from the newest whole checkpoint in `directory`, if there is one. False: that
            directory must not have any.
        nonfinite: what happens when a gradient is NaN or infinite. "skip": the update is left out, and the run stops
            after `nonfinite_limit` such in a row; "stop": the run stops at the first; "ignore": no check, and so on an
            accelerator no waiting for the device. Where a gradient overflows for float16's scale, the update is left
            out in any case, and counts as one of these only once the scale is down to 1.
        nonfinite_limit: see there.
        log_every: updates between Progress events. Between them nothing is read from the device but whether the
            gradient is finite.
        seed: of the order of the data, 0 to 2**63 - 1. None: drawn from torch's generator when a new run starts.
        sharded: that in a run of several processes the data already are this process's own part.
    """

    epochs: int | None = None
    steps: int | None = None
    batch_size: int | str | None = None
    shuffle: bool = True
    accumulation: int = 1
    precision: str = "float32"
    clip: float | None = None
    average: float | None = None
    average_warmup: bool = True
    validate_every: int | None = None
    early_stopping: int | None = None
    monitor: str = "loss"
    maximize: bool = False
    directory: str | os.PathLike[str] | None = None
    checkpoint_every: int = 1000
    keep: int = 3
    resume: bool = True
    nonfinite: str = "skip"
    nonfinite_limit: int = 10
    log_every: int = 50
    seed: int | None = None
    sharded: bool = False

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"give epochs or steps, one of them: epochs is {self.epochs}, steps is {self.steps}")
        for name in ("epochs", "steps", "validate_every", "early_stopping"):
            self._check_count(name, optional=True)
        for name in ("accumulation", "checkpoint_every", "keep", "nonfinite_limit", "log_every"):
            self._check_count(name)
        if self.batch_size != "full":
            self._check_count("batch_size", optional=True, also=' or "full"')
        self._check_choice("precision", PRECISIONS)
        self._check_choice("nonfinite", NONFINITE)
        self._check_number("clip", low=0.0, low_open=True)
        self._check_number("average", low=0.0, high=1.0)
        seed = self.seed
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63):
            raise ValueError(f"seed is {seed!r}; it must be a whole number from 0 to 2**63 - 1")
        for name in ("shuffle", "average_warmup", "maximize", "resume", "sharded"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be True or False")

    @classmethod
    def of(cls, options: Options | None, choices: Mapping[str, Any]) -> Options:
        """The given object, or one of choices by name; ValueError for an unknown name, with the nearest known one."""
        known = [field.name for field in fields(cls)]
        for name in choices:
            if name not in known:
                nearest = difflib.get_close_matches(name, known, 1)
                raise ValueError(f"there is no option {name!r}" + (f"; is it {nearest[0]!r}?" if nearest else ""))
        if options is not None and choices:
            raise ValueError(f"give options, or {', '.join(choices)} by name, not both")
        return cls(**choices) if options is None else options

    def plain(self) -> dict[str, Any]:
        """The options as JSON knows them: numbers, strings, booleans and None."""
        options = asdict(self)
        options["directory"] = None if self.directory is None else str(Path(self.directory))
        return options

    def _check_count(self, name: str, optional: bool = False, also: str = "") -> None:
        value = getattr(self, name)
        if optional and value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1{also}")

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, choices))}")

    def _check_number(self, name: str, low: float, high: float = math.inf, low_open: bool = False) -> None:
        value = getattr(self, name)
        if value is None:
            return
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not low <= value < high or (low_open and value == low):
            bounds = f"greater than {low:g}" if low_open else f"of at least {low:g}"
            below = "" if high == math.inf else f" and less than {high:g}"
            raise ValueError(f"{name} is {value!r}; it must be a number {bounds}{below}")
