"""Everything about a run that is a choice and not an object: checked once, at construction."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from trainopt.optim.state_dtype import DTYPES
from trainopt.training.fields import FLAG, TEXT, check, choice, option, real, whole

PRECISIONS = ("float32", "bfloat16", "float16")
NONFINITE = ("skip", "stop", "ignore")
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
#: What does not go with steps within backward: an option, its values that do, and why.
NOT_IN_BACKWARD = (
    ("accumulation", (1,), "the first backward pass would step by its own gradient"),
    ("clip", (None,), "the norm of all gradients is known only when backward has ended"),
    ("precision", ("float32", "bfloat16"), "gradients have GradScaler's scale until backward has ended"),
)
OF_THE_OPTIMIZER = ("lr", "learning_rate", "weight_decay", "wd", "momentum", "betas", "eps")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a run does. ValueError with the option's name and value where a value makes no sense.

    Args:
        epochs: passes over the training data. Give this or `steps`.
        steps: updates of the weights.
        batch_size: samples in a micro-batch, over all processes, where the data are plain tensors; "full" for all of
            them (gradient descent). A DataLoader has its own.
        shuffle: whether plain tensors come in a new random order in each epoch. A DataLoader decides itself.
        accumulation: micro-batches in one update. The gradient is that of the mean over all that the loss counts in
            them, as if they were one batch. At the end of an epoch an update may have fewer.
        precision: "float32", or the type that autocast computes in: "bfloat16", or "float16" with a GradScaler.
        clip: largest global norm of the gradient; a longer one is scaled down to it. None: no clipping.
        average: decay of the moving average of the weights, in [0, 1); evaluation is then on the average. None: none.
        average_warmup: whether the decay starts small (`trainopt.training.average`).
        state_dtype: what the optimizer's states are stored in, one of trainopt's: "float32", "bfloat16", "float16" or
            "8bit". None: as the optimizer has it.
        step_in_backward: whether each parameter is stepped as soon as backward has its gradient, which is then freed.
            Not with accumulation, clip, float16 or several processes. The loss is looked at in place of the gradients.
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
        nonfinite_limit: updates left out in a row after which the run stops.
        log_every: updates between Progress events. Between them nothing is read from the device but whether the
            gradient is finite.
        seed: of the order of the data, 0 to 2**63 - 1. None: drawn from torch's generator when a new run starts.
        sharded: that in a run of several processes the data already are this process's own part.
    """

    epochs: int | None = option(None, whole(1))
    steps: int | None = option(None, whole(1))
    batch_size: int | str | None = option(None, whole(1, word="full"))
    shuffle: bool = option(True, FLAG)
    accumulation: int = option(1, whole(1))
    precision: str = option("float32", choice(*PRECISIONS))
    clip: float | None = option(None, real(0, above=True))
    average: float | None = option(None, real(0, 1.0, below=True))
    average_warmup: bool = option(True, FLAG)
    state_dtype: str | None = option(None, choice(*DTYPES))
    step_in_backward: bool = option(False, FLAG)
    validate_every: int | None = option(None, whole(1))
    early_stopping: int | None = option(None, whole(1))
    monitor: str = option("loss", TEXT)
    maximize: bool | None = option(None, FLAG)
    schedule_every: str | None = option(None, choice(*SCHEDULE_UNITS))
    directory: str | os.PathLike[str] | None = option(None, TEXT)  # noqa: RUF009
    checkpoint_every: int | None = option(None, whole(1))
    checkpoint_minutes: float = option(10.0, real(0, above=True))
    keep: int = option(3, whole(1))
    resume: bool = option(True, FLAG)
    nonfinite: str = option("skip", choice(*NONFINITE))
    nonfinite_limit: int = option(10, whole(1))
    log_every: int = option(50, whole(1))
    seed: int | None = option(None, whole(0))
    sharded: bool = option(False, FLAG)

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"give epochs or steps, one of them: epochs is {self.epochs}, steps is {self.steps}")
        check(self)
        for name, goes, why in NOT_IN_BACKWARD if self.step_in_backward else ():
            if (value := getattr(self, name)) not in goes:
                raise ValueError(f"step_in_backward is True, but {name} is {value!r}: {why}")

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
