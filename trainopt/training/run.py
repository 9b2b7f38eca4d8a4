"""What a run trains with, how far it is, and how it begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from trainopt.training import counting, gradients, random_state, state
from trainopt.training.average import WeightAverage
from trainopt.training.best import Best
from trainopt.training.checkpoint import Checkpoints
from trainopt.training.counting import Count
from trainopt.training.data import Source, TensorSource, is_tensors, source_of
from trainopt.training.distributed import Processes, bare
from trainopt.training.evaluation import Task
from trainopt.training.interval import Interval
from trainopt.training.options import Options
from trainopt.training.precision import Precision
from trainopt.training.report import Message, Report, Silent, Started
from trainopt.training.signals import StopSignals
from trainopt.training.watch import Watch
from trainopt.training.window import Window

Metrics = Mapping[str, Callable[[Any, Any], Any]]


class Run:
    """The objects of one run, and its counters. Building it checks everything and changes nothing.

    Args: as of `trainopt.training.fit`.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        loss: Callable[[Any, Any], Tensor],
        optimizer: torch.optim.Optimizer,
        options: Options,
        validation: Any,
        metrics: Metrics,
        schedule: Any,
        report: Report,
        count: Callable[[Any], Count] | None,
        split: Callable[[Any], tuple[Any, Any]] | None,
    ) -> None:
        self.options, self.optimizer, self.schedule, self.metrics = options, optimizer, schedule, metrics
        self.model, self.module = model, bare(model)  # the one that averages gradients over processes, and the person's
        self.device = check_objects(self.module, optimizer, schedule, options, validation, metrics)
        self.processes = Processes.join(self.device)
        self.source = source_of(data, options.batch_size, options.shuffle, self.processes, options.sharded)
        self.validation: Source | None = None
        if validation is not None:
            size = validation_size(options.batch_size, validation)
            self.validation = source_of(validation, size, False, self.processes, options.sharded, "validation")
        if count is None:
            count = counting.default_count(loss)
            if split is None and isinstance(self.source, TensorSource) and len(self.source.tensors) == 2:
                count = counting.count_by_shape(count, self.source.tensors[1])
        self.task = Task(loss, count, split)
        self.precision = Precision(options.precision, self.device)
        self.checkpoints: Checkpoints | None = None
        if options.directory is not None:
            self.checkpoints = Checkpoints(Path(options.directory) / "checkpoints", options.keep)
            if self.processes.is_first:
                self.checkpoints.check_writable()
                if not options.resume and self.checkpoints.paths():
                    raise ValueError(f"resume is False, but {self.checkpoints.directory} has checkpoints")

        self.report: Report = report if self.processes.is_first else Silent()
        self.signals = StopSignals()
        self.average: WeightAverage | None = None
        if options.average is not None:
            self.average = WeightAverage(self.module, options.average, options.average_warmup)
        self.buffers = list(self.module.buffers())
        self.must_check = options.nonfinite != "ignore" or self.precision.scaler is not None

        # How far it is. All of this is in a checkpoint (`trainopt.training.state`).
        self.step = 0  # updates made
        self.epoch = self.batch = 0  # the position: epochs completed, and micro-batches drawn in this one
        self.samples = self.skipped = self.skipped_in_a_row = 0
        self.train_loss = float("nan")  # mean over the last interval between two Progress events
        self.validated_step = -1
        self.window: Window | None = None  # the update under way
        self.interval = Interval()
        self.watch = Watch(options.log_every, options.early_stopping is not None)
        self.best = Best(options.maximize, keeps_weights=options.early_stopping is not None)
        self.seed = 0 if options.seed is None else options.seed

        self.lr: Any = optimizer.param_groups[0]["lr"]  # that the last update used
        self.norm: Tensor | None = None  # of the last update's gradient, unscaled, before clipping
        self.reason: str | None = None  # why the run must end, where an update has found out
        self.suspects: list[Any] | None = None  # the micro-batches of the last update that was not finite
        self.checkpoint: Path | None = None  # the newest
        self.begun = self.interval_begun = perf_counter()
        self.steps_before = 0

    def start(self) -> None:
        """Carries on from the newest whole checkpoint, or begins."""
        options, processes = self.options, self.processes
        corrupt: list[tuple[Path, str]] = []
        found = None
        if self.checkpoints is not None and processes.is_first:
            found = self.checkpoints.newest(lambda path, why: corrupt.append((path, why)))
        found = processes.broadcast(found)
        if found is not None:
            self.checkpoint = found[0]
            state.restore(self, found[1], found[0])
        else:
            if options.seed is None:
                self.seed = processes.broadcast(int(torch.randint(2**63 - 1, ())))
            if processes.rank > 0:  # a script seeds every process alike, but dropout must differ
                random_state.reseed(random_state.derived(self.seed, -processes.rank))
        if self.checkpoints is not None:
            state.collect(self)  # what a checkpoint cannot hold is a TypeError now, not after an hour
        self.model = processes.wrap(self.model)
        if not self.module.training:
            self.module.train()
        self.begun = self.interval_begun = perf_counter()
        self.steps_before = self.step
        self.report.started(
            Started(
                options=options,
                model=type(self.module).__name__,
                parameters=sum(param.numel() for param in self.module.parameters() if param.requires_grad),
                optimizer=type(self.optimizer).__name__,
                device=str(self.device),
                processes=processes.world,
                step=self.step,
                total_steps=self.total_steps(),
                resumed_from=self.checkpoint,
            )
        )
        for path, why in corrupt:
            self.say("warning", "checkpoint", f"{path} was skipped: {why}")

    def total_steps(self) -> int | None:
        """Updates of the whole run if none is skipped; None where the data has no length."""
        if self.options.steps is not None:
            return self.options.steps
        if self.source.length is None or self.options.epochs is None:
            return None
        return self.options.epochs * -(-self.source.length // self.options.accumulation)

    def say(self, kind: str, topic: str, text: str) -> None:
        """A sentence for the person."""
        self.report.message(Message(self.step, kind, topic, text))


def check_objects(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    options: Options,
    validation: Any,
    metrics: Metrics,
) -> torch.device:
    """The model's device; ValueError or TypeError for objects that do not go together."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, not a torch.nn.Module")
    own = list(model.parameters())
    if not own:
        raise ValueError(f"model, a {type(model).__name__}, has no parameters")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}, not a torch.optim.Optimizer")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("optimizer is LBFGS, whose step needs a closure; fit gives none")
    if not {id(param) for param in own} & {id(param) for param in gradients.parameters(optimizer)}:
        raise ValueError("optimizer has no parameter of model: was the model copied after the optimizer was made?")
    if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise ValueError("schedule is ReduceLROnPlateau, which steps on validations; fit steps it on updates")
    missing = [name for name in ("step", "state_dict", "load_state_dict") if not hasattr(schedule, name)]
    if schedule is not None and missing:
        raise TypeError(f"schedule is a {type(schedule).__name__}, without {', '.join(missing)}")
    if options.monitor != "loss" and options.monitor not in metrics:
        raise ValueError(
            f"monitor is {options.monitor!r}; it must be 'loss' or a metric: {sorted(metrics) or 'there is none'}"
        )
    for name in ("validate_every", "early_stopping"):
        if validation is None and getattr(options, name) is not None:
            raise ValueError(f"{name} is {getattr(options, name)}, but there is no validation data")
    if "loss" in metrics:
        raise ValueError("metrics has 'loss', the name of the validation loss")
    return own[0].device


def validation_size(size: int | str | None, validation: Any) -> int | str | None:
    """The size of validation's batches: that of training for plain tensors, or all where they are fewer."""
    if not is_tensors(validation):
        return None
    return "full" if not isinstance(size, int) or size > len(validation[0]) else size
