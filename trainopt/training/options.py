"""Everything about a run that is a choice and not an object: checked once, at construction."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

PRECISIONS = ("float32", "bfloat16", "float16")
NONFINITE = ("skip", "stop", "ignore")
TOO_MANY = 2**63
SCHEDULE_UNITS = ("update", "epoch", "validation")

#: Words in the names of metrics that grow when things go well, and of those that fall.
GROWING = (
    *("acc", "accuracy", "precision", "recall", "sensitivity", "specificity", "f1", "fbeta", "fscore", "auc"),
    *("auroc", "auprc", "ap", "map", "iou", "miou", "jaccard", "dice", "mcc", "kappa", "bleu", "rouge"),
    *("meteor", "r2", "psnr", "ssim", "top1", "top3", "top5", "top10", "topk", "hit", "hits", "ndcg", "mrr"),
    *("reward", "likelihood", "correlation", "pearson", "spearman", "match", "success"),
)
FALLING = (
    *("loss", "error", "err", "mse", "rmse", "mae", "mape", "smape", "nll", "bce", "ce", "entropy"),
    *("perplexity", "ppl", "wer", "cer", "fid", "brier", "ece", "distance", "divergence", "kl", "huber"),
    *("regret", "cost"),
)
#: What other programs call an option, and what is not an option of a run.
OTHER_NAMES = {
    **dict.fromkeys(("max_epochs", "num_epochs", "num_train_epochs", "n_epochs"), "epochs"),
    **dict.fromkeys(("max_steps", "num_steps", "iterations", "iters", "max_iters", "updates"), "steps"),
    **dict.fromkeys(("batch", "bs", "per_device_train_batch_size", "micro_batch_size"), "batch_size"),
    **dict.fromkeys(("gradient_accumulation_steps", "accumulate_grad_batches", "grad_accum", "accum"), "accumulation"),
    **dict.fromkeys(("max_grad_norm", "grad_clip", "clip_grad", "gradient_clip_val", "clip_grad_norm"), "clip"),
    **dict.fromkeys(("ema", "ema_decay", "model_ema", "moving_average"), "average"),
    **dict.fromkeys(("eval_every", "eval_steps", "val_every", "check_val_every_n_epoch"), "validate_every"),
    **dict.fromkeys(("patience", "early_stop", "early_stopping_patience"), "early_stopping"),
    **dict.fromkeys(("save_every", "save_steps", "checkpoint_steps"), "checkpoint_every"),
    **dict.fromkeys(("save_total_limit", "keep_last", "max_checkpoints"), "keep"),
    **dict.fromkeys(("output_dir", "out_dir", "save_dir", "log_dir", "run_dir"), "directory"),
    **dict.fromkeys(("logging_steps", "log_interval", "log_steps", "print_every"), "log_every"),
    **dict.fromkeys(("amp", "dtype", "mixed_precision"), "precision"),
    **dict.fromkeys(("random_seed", "manual_seed"), "seed"),
    **dict.fromkeys(("restart", "resume_from_checkpoint"), "resume"),
    **dict.fromkeys(("metric_for_best_model",), "monitor"),
    **dict.fromkeys(("greater_is_better", "mode"), "maximize"),
}
OF_THE_OPTIMIZER = ("lr", "learning_rate", "weight_decay", "wd", "momentum", "betas", "eps")


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
        maximize: whether a larger value of `monitor` is better. None: as the name says, "accuracy" or "val_f1" that it
            is, "rmse" that it is not; a name that says nothing is a ValueError.
        schedule_every: what the schedule counts: it steps after every "update" that was made, after every "epoch", or
            after every "validation". None: after every update; ReduceLROnPlateau, which is given the value of
            `monitor`, after every validation.
        directory: folder of the run, made if need be: checkpoints go into its folder "checkpoints", the best weights
            into best.pt, what is told into metrics.jsonl, the options into config.json. None: nothing is written.
        checkpoint_every: updates between checkpoints. None: one at every validation; where there is no validation, at
            the ends of epochs that took 20 times as long as it takes to write one. There is one at the end too.
        checkpoint_minutes: minutes since the last checkpoint after which there is one in any case.
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
    maximize: bool | None = None
    schedule_every: str | None = None
    directory: str | os.PathLike[str] | None = None
    checkpoint_every: int | None = None
    checkpoint_minutes: float = 10.0
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
        for name in ("epochs", "steps", "validate_every", "early_stopping", "checkpoint_every"):
            self._check_count(name, optional=True)
        for name in ("accumulation", "keep", "nonfinite_limit", "log_every"):
            self._check_count(name)
        if self.batch_size != "full":
            self._check_count("batch_size", optional=True, also=' or "full"')
        self._check_choice("precision", PRECISIONS)
        self._check_choice("nonfinite", NONFINITE)
        if self.schedule_every is not None:
            self._check_choice("schedule_every", SCHEDULE_UNITS)
        self._check_number("clip", low=0.0, low_open=True)
        self._check_number("average", low=0.0, high=1.0)
        if self.checkpoint_minutes is None:
            raise ValueError("checkpoint_minutes is None; it must be a number greater than 0")
        self._check_number("checkpoint_minutes", low=0.0, low_open=True)
        if not isinstance(self.monitor, str):
            raise ValueError(f"monitor is {self.monitor!r}; it must be 'loss' or the name of a metric")
        seed = self.seed
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63):
            raise ValueError(f"seed is {seed!r}; it must be a whole number from 0 to 2**63 - 1")
        for name in ("shuffle", "average_warmup", "resume", "sharded"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be True or False")
        if self.maximize is not None and not isinstance(self.maximize, bool):
            raise ValueError(f"maximize is {self.maximize!r}; it must be True or False")

    @classmethod
    def of(cls, options: Options | None, choices: Mapping[str, Any]) -> Options:
        """The given object, or one of choices by name; ValueError for an unknown name, with the nearest known one."""
        known = [field.name for field in fields(cls)]
        for name in choices:
            if name not in known:
                raise ValueError(f"there is no option {name!r}{hint(name, known)}")
        if options is not None and choices:
            raise ValueError(f"give options, or {', '.join(choices)} by name, not both")
        return cls(**choices) if options is None else options

    @property
    def is_larger_better(self) -> bool:
        """Whether a larger value of `monitor` is better. ValueError where neither `maximize` nor the name says."""
        if self.maximize is not None:
            return self.maximize
        parts = parts_of_name(self.monitor)
        grows, falls = not parts.isdisjoint(GROWING), not parts.isdisjoint(FALLING)
        if grows == falls:
            raise ValueError(
                f"monitor is {self.monitor!r}, which does not say whether more of it is better: give maximize=True or"
                " False"
            )
        return grows

    def total_steps(self, batches: int | None) -> int | None:
        """Updates of the whole run, none of them skipped, with so many micro-batches in an epoch; None where that is
        not known."""
        if self.steps is not None:
            return self.steps
        if batches is None or self.epochs is None:
            return None
        return self.epochs * -(-batches // self.accumulation)

    def plain(self) -> dict[str, Any]:
        """The options as JSON knows them: numbers, strings, booleans and None."""
        options = asdict(self)
        options["directory"] = None if self.directory is None else str(Path(self.directory))
        return options

    def _check_count(self, name: str, optional: bool = False, also: str = "") -> None:
        value = getattr(self, name)
        if optional and value is None:
            return
        if isinstance(value, int) and value >= TOO_MANY:  # islice and torch count in 64 bits
            raise ValueError(f"{name} is {f'{value:.3g}' if value < 10**300 else 'too large'}; it must be below 2**63")
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


def parts_of_name(name: str) -> set[str]:
    """The words in a metric's name, such as "val", "top" and "acc" in "valTop_acc1"."""
    apart = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name)
    words = re.split(r"[^a-z0-9]+", f"{name} {apart}".lower())
    return {*words, *(word.rstrip("0123456789") for word in words)}


def hint(name: str, known: Sequence[str]) -> str:
    """What a person may have meant by an option that there is not, as the end of a sentence."""
    if name in OF_THE_OPTIMIZER:
        return ": it is the optimizer's"
    nearest = [OTHER_NAMES[name]] if name in OTHER_NAMES else difflib.get_close_matches(name, known, 1)
    return f"; is it {nearest[0]!r}?" if nearest else ""
