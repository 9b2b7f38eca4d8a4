"""The training loop: micro-batches in, updates of the weights, and what is shown and saved between them.

From top to bottom: `fit` is what a person calls, `Loop.train` goes through the epochs, `Loop.update` makes one update.
What is trained, the model and the loss, is in `trainopt.training.trained`; what a checkpoint holds in
`trainopt.training.state`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from trainopt.functional import check_targets
from trainopt.training import gradients, random_state, state
from trainopt.training.average import WeightAverage
from trainopt.training.best import Best
from trainopt.training.checkpoint import Checkpoints, plain, write
from trainopt.training.console import Several
from trainopt.training.counting import Count, is_counted
from trainopt.training.data import Source, TensorSource, move, source_of
from trainopt.training.distributed import Processes, is_sharded
from trainopt.training.evaluation import evaluate
from trainopt.training.folder import Folder
from trainopt.training.given import differences, given_to
from trainopt.training.interval import Interval
from trainopt.training.modes import Modes
from trainopt.training.nonfinite import Finding, first_nonfinite, nonfinite_gradient, nonfinite_parameter
from trainopt.training.objects import Metrics, Pace, check_objects, check_validation, validation_size
from trainopt.training.options import Options
from trainopt.training.precision import Precision
from trainopt.training.report import Finished, Lines, Message, Progress, Report, Silent, Started, Validated
from trainopt.training.signals import StopSignals
from trainopt.training.state import Counters
from trainopt.training.trained import Trained, without_averaging
from trainopt.training.watch import Watch
from trainopt.training.window import Window

#: How a process should end after a run that ended for this reason; 1 for any other.
STATUS = {"finished": 0, "early stopping": 0, "SIGINT": 130, "SIGTERM": 143}
COSTLY = 20  # an epoch without validation ends in a checkpoint if it took this many times as long as writing one


@dataclass(frozen=True)
class Result:
    """How a run ended. The model holds the weights of its last update; with `early_stopping`, the best ones."""

    step: int  # updates made in the whole run
    epoch: int  # passes over the data completed
    reason: str  # as in `Finished`
    loss: float  # mean over the last interval
    best: float | None  # the best value of `monitor`
    best_step: int | None
    checkpoint: Path | None  # the newest
    average: dict[str, Tensor] | None  # the moving average of the weights, for model.load_state_dict
    suspects: list[Any] | None  # the micro-batches of the last update that was left out as not finite
    criterion_average: dict[str, Tensor] | None = None  # that of what the loss owns, for loss.load_state_dict

    @property
    def is_complete(self) -> bool:
        """Whether the run came to its end: not by a signal, and not because nothing was finite any more."""
        return self.exit_status == 0

    @property
    def exit_status(self) -> int:
        """What the program should exit with: 0, 130 after SIGINT, 143 after SIGTERM, 1 where nothing was finite."""
        return STATUS.get(self.reason, 1)


def fit(
    model: nn.Module,
    data: Any,
    loss: Callable[[Any, Any], Any] | None,
    optimizer: torch.optim.Optimizer,
    options: Options | None = None,
    *,
    validation: Any = None,
    metrics: Mapping[str, Callable[[Any, Any], Any]] | None = None,
    schedule: Any = None,
    report: Report | None = None,
    count: Callable[[Any], Count] | None = None,
    split: Callable[[Any], tuple[Any, Any]] | None = None,
    **choices: Any,
) -> Result:
    """Trains `model`: `fit(model, loader, loss, optimizer, epochs=3)`.

    Args:
        model: on its device. Its output for a batch's inputs goes to the loss.
        data: a DataLoader, a tuple of tensors (then `batch_size` says how they are cut), or any iterable of batches
            that can be gone through again each epoch. Under torchrun a DataLoader's batch is that of all processes
            together, and each loads its share.
        loss: `loss(output, target)`, the mean over what it counts, or the pair (sum, count). None where the model's
            output has its own as `.loss`. What it owns (parameters, buffers) is trained and saved with the model.
        optimizer: any torch optimizer over parameters of the model and the loss whose step needs no closure.
        options: the choices, where they are at hand as an object; else give them by name (`Options`).
        validation: data of the same kinds, gone through in evaluation mode; plain tensors in order.
        metrics: by name, `metric(output, target)`: the mean over the samples of a batch, a number or 0-dim tensor.
        schedule: anything with `step()`, `state_dict()` and `load_state_dict()`, a torch LRScheduler for one; stepped
            once after every update, not after a skipped one, or as `schedule_every` says.
        report: receives what happens; lines on standard output by default.
        count: how many the loss counts in a target (tokens, samples). By default the loss is asked
            (`trainopt.training.criterion`). A micro-batch with a count of 0 is left out, unless the count is a tensor
            on an accelerator: the gradient of its loss must be finite then.
        split: `(inputs, target)` of a batch, which is such a pair by default, or, for a model that computes its own
            loss, a mapping of its arguments. Inputs that are a tuple or list are given to the model as its arguments,
            those that are a mapping as its keyword arguments.

    Raises:
        ValueError, TypeError: for what cannot be right, naming it, before anything is written or changed.

    Without `directory` nothing is written, except by `report`. SIGTERM and the first Ctrl-C end the run after the step
    that it is in, with a checkpoint if there is a directory; `Result.reason` and `Result.exit_status` tell it from
    success. Called again with the same arguments, the run carries on, to the same bits on the CPU.
    """
    loop = Loop(
        model,
        data,
        loss,
        optimizer,
        Options.of(options, choices),
        validation=validation,
        metrics=metrics or {},
        schedule=schedule,
        report=Lines() if report is None else report,
        count=count,
        split=split,
    )
    reason = "error"
    with loop.signals:
        loop.start()
        try:
            reason = loop.train()
            loop.end(reason)
        except BaseException as error:
            reason = type(error).__name__
            raise
        finally:
            at, best = loop.counters, loop.best
            summary = (at.step, at.epoch, reason, at.train_loss, best.value, best.step)
            loop.report.finished(Finished(*summary, perf_counter() - loop.begun, at.samples, loop.checkpoint))
    average, trained = loop.average, loop.trained
    of_model = None if average is None else average.model_state(trained.model)
    of_loss = None if average is None else average.model_state(trained.criterion.owned)
    return Result(*summary, loop.checkpoint, of_model, loop.suspects, of_loss)


class Loop:
    """One run: its objects, how far it is, and how it goes on. Building it checks everything and changes nothing.

    Args: as of `fit`.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        loss: Callable[[Any, Any], Any] | None,
        optimizer: torch.optim.Optimizer,
        options: Options,
        *,
        validation: Any,
        metrics: Metrics,
        schedule: Any,
        report: Report,
        count: Callable[[Any], Count] | None,
        split: Callable[[Any], tuple[Any, Any]] | None,
    ) -> None:
        self.options, self.optimizer, self.metrics = options, optimizer, metrics
        self.device = check_objects(model, optimizer, options, validation, metrics, schedule)
        self.pace = Pace(schedule, options.schedule_every, validation is not None)
        self.trained = Trained(model, loss, optimizer, count, split)
        self.criterion = self.trained.criterion
        self.is_sharded = is_sharded(self.trained.model)
        self.processes = Processes.join(self.device)
        self.source = source_of(data, options.batch_size, options.shuffle, self.processes, options.sharded)
        self.validation: Source | None = None
        if validation is not None:
            size = validation_size(options.batch_size, validation)
            self.validation = source_of(validation, size, False, self.processes, options.sharded, "validation")
            check_validation(self.validation)
        self.planned: Callable[[Any], Count] = self.trained.planned
        if split is None and isinstance(self.source, TensorSource) and len(self.source.tensors) == 2:
            self.planned = planned_by_shape(self.trained, self.source.tensors[1])
        self.precision = Precision(options.precision, self.device)
        self.checkpoints: Checkpoints | None = None
        if options.directory is not None:
            self.checkpoints = Checkpoints(Path(options.directory) / "checkpoints", options.keep)
            if self.processes.is_first:
                self.checkpoints.check_writable()
                if not options.resume and self.checkpoints.paths():
                    raise ValueError(f"resume is False, but {self.checkpoints.directory} has checkpoints")
        self.report: Report = Silent()
        if self.processes.is_first:
            self.report = report if options.directory is None else with_folder(report, Path(options.directory))

        self.forward: Callable[..., tuple[Tensor, Count | None]] = self.trained.forward
        self.wrappers = self.trained.wrappers()  # that average gradients over the processes
        self.modes = Modes(optimizer)
        self.signals = StopSignals()
        self.average: WeightAverage | None = None
        self.buffers: list[Tensor] = []  # of what is trained
        self.must_check = options.nonfinite != "ignore" or self.precision.scaler is not None
        self.given = given_to(options, optimizer, schedule)

        # How far it is: `parts`, and what is under way. All of this is in a checkpoint.
        self.counters = Counters()
        self.interval = Interval()
        self.watch = Watch(options.log_every, options.early_stopping is not None, measures=not self.is_sharded)
        self.trained.look = self.look
        self.best = Best(options.is_larger_better, keeps_weights=options.early_stopping is not None)
        self.window: Window | None = None  # the update under way
        self.seed = 0 if options.seed is None else options.seed

        self.lr: Any = optimizer.param_groups[0]["lr"]  # that the last update used
        self.norm: Tensor | None = None  # of the last update's gradient, unscaled, before clipping
        self.reason: str | None = None  # why the run must end, where an update has found out
        self.suspects: list[Any] | None = None  # the micro-batches of the last update that was not finite
        self.checkpoint: Path | None = None  # the newest
        self.is_saved = False  # whether it holds all that there is
        self.saved_at, self.saving_took = perf_counter(), 0.0
        self.has_said_what_is_counted = False
        self.begun = self.interval_begun = perf_counter()
        self.steps_before = 0

    def parts(self) -> dict[str, Any]:
        """What has a state of its own, beside what is trained; None for what there is not."""
        return {
            "optimizer": self.optimizer,
            "schedule": self.pace.schedule,
            "scaler": self.precision.scaler,
            "average": self.average,
            "counters": self.counters,
            "interval": self.interval,
            "watch": self.watch,
            "best": self.best,
        }

    # From the beginning to the end ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Carries on from the newest whole checkpoint, or begins."""
        options, processes = self.options, self.processes
        corrupt: list[tuple[Path, str]] = []
        found = None
        if self.checkpoints is not None and processes.is_first:
            found = self.checkpoints.newest(lambda path, why: corrupt.append((path, why)), state.check_fields)
        found = processes.broadcast(found)
        self.trained.place()
        self.buffers = list(self.trained.buffers())
        if options.average is not None:
            self.average = WeightAverage(self.trained, options.average, options.average_warmup)
        changes: list[str] = []
        if found is not None:
            self.checkpoint, saved = found
            state.restore(self, saved, self.checkpoint)
            self.is_saved = True
            changes = self.adopt(saved.get("given"))
        else:
            if options.seed is None:
                self.seed = processes.broadcast(int(torch.randint(2**63 - 1, ())))
            if processes.rank > 0:  # a script seeds every process alike, but dropout must differ
                random_state.reseed(random_state.derived(self.seed, -processes.rank))
            self.modes.train()
        if self.checkpoints is not None:
            state.collect(self)  # what a checkpoint cannot hold is a TypeError now, not after an hour
        self.forward = self.trained.parallel(processes)
        self.wrappers = self.trained.wrappers(self.forward)
        self.trained.begin()
        self.begun = self.interval_begun = self.saved_at = perf_counter()
        self.steps_before = self.counters.step
        self.report.started(
            Started(
                options=options,
                model=type(self.trained.model).__name__,
                parameters=sum(param.numel() for param in self.trained.parameters() if param.requires_grad),
                optimizer=type(self.optimizer).__name__,
                device=str(self.device),
                processes=processes.world,
                step=self.counters.step,
                total_steps=self.total_steps(),
                resumed_from=self.checkpoint,
            )
        )
        for path, why in corrupt:
            self.say("warning", "checkpoint", f"{path} was skipped: {why}")
        for change in changes:
            self.say("warning", "resume", change)
        if found is not None and (reason := self.reason_to_end()) in ("finished", "early stopping"):
            how = "" if reason == "finished" else " by early stopping"
            self.say(
                "warning",
                "resume",
                f"the run in {options.directory} is already finished{how}, after step {self.counters.step:,}, and "
                "nothing is trained: to train on, give more epochs or steps; to begin anew, use another directory or "
                "resume=False, once its checkpoints have been moved away",
            )

    def adopt(self, before: dict[str, Any] | None) -> list[str]:
        """What is done about arguments that are not those which the run was given before: a sentence for each."""
        if before is None:  # of an older version
            return []
        then, now = before["options"], self.given["options"]
        if any(then.get(name) != now[name] for name in ("monitor", "maximize")):
            self.best = Best(self.options.is_larger_better, self.best.keeps_weights)
        return list(differences(before, self.given))

    def train(self) -> str:
        """Epoch after epoch, window after window; returns why it ended."""
        at = self.counters
        while (reason := self.reason_to_end()) is None:
            updates, first = at.step + at.skipped, at.batch
            for window in self.windows():
                if self.update(window):
                    self.after_update(window)
                if (reason := self.reason_to_end()) is not None:
                    return reason
            if first == 0 and at.step + at.skipped == updates:
                raise ValueError("an epoch held nothing that the loss counts: is data empty, or every target ignored?")
            self.after_epoch()
        return reason

    def reason_to_end(self) -> str | None:
        """Why the run ends here; None if it goes on."""
        options, at = self.options, self.counters
        if self.reason is not None:
            return self.reason
        if self.signals.received is not None and self.processes.world == 1:
            return self.signals.received
        if options.early_stopping is not None and self.best.since >= options.early_stopping:
            return "early stopping"
        is_done = at.epoch >= (options.epochs or 0) if options.steps is None else at.step >= options.steps
        return "finished" if is_done else None

    def windows(self) -> Iterator[Window]:
        """The rest of this epoch in pieces of one update; first the one that was under way, if any."""
        if self.window is not None:
            yield self.window
        micro_batches = self.source.epoch(self.seed, self.counters.epoch, self.counters.batch)
        while True:
            drawn = list(itertools.islice(micro_batches, self.options.accumulation))
            if self.options.sharded:  # the processes' parts may differ in length: the shortest ends the epoch
                drawn = drawn[: int(self.processes.min(len(drawn)))]
            if not drawn:
                return
            self.counters.batch += len(drawn)
            self.window = Window.of(drawn, self.planned)
            if self.processes.world > 1:
                asks = "stop " * (self.signals.received is not None) + "save" * self.is_late()
                self.window.share(self.processes, asks)
            yield self.window

    def end(self, reason: str) -> None:
        """The last interval, validation and checkpoint, and the best weights if they were kept."""
        if reason == "nonfinite":  # the last good checkpoint stays as it is
            self.modes.eval()
            return
        if reason in ("finished", "early stopping"):
            if self.interval.samples:
                self.progress()
            self.validate()
            if (text := self.watch.lost.summary()) is not None:
                self.say("warning", "nonfinite", text)
            if (message := self.watch.ended(self.counters.step, self.total_steps(), float(self.lr))) is not None:
                self.report.message(message)
        self.save()
        self.modes.eval()
        if reason in ("SIGTERM", "SIGINT"):
            saved = "no directory was given, so nothing is saved"
            if self.checkpoint is not None:
                saved = f"{self.checkpoint} holds everything: start the same run again to carry on from there"
            self.say("info", "stop", f"stopped by {reason} after step {self.counters.step:,}; {saved}")
        elif self.best.weights is not None:
            self.trained.load(self.best.weights)

    # One update -------------------------------------------------------------------------------------------------------

    def update(self, window: Window) -> bool:
        """One update of the weights; whether it was made.

        It is not if the gradient is not finite, if the loss counts nothing in the window, or if a signal came between
        two micro-batches: then, and only then, the window stays under way.
        """
        if "stop" in window.asked:  # every process knows it: all stop after this update
            self.reason = next(filter(None, self.processes.gather(self.signals.received)))
        self.is_saved = False
        if window.is_empty:
            self.window = None
            return False
        if not window.done:
            gradients.clear(self.optimizer)
            self.watch.begin(self.counters.step + 1)
            window.buffers = [buffer.clone() for buffer in self.buffers]
        while window.done < len(window.batches):
            self.micro_step(window)
            window.done += 1
            if self.signals.received is not None and self.processes.world == 1 and window.done < len(window.batches):
                return False
        self.window = None

        if self.trained.apart:
            self.processes.average_gradients(self.trained.apart)
        correction = 1.0 if self.criterion.is_exact else window.correction(self.processes)
        if correction is None:
            return False
        params = gradients.parameters(self.optimizer)
        gradients.scale(params, correction)
        self.precision.unscale(self.optimizer)
        limit = self.options.clip
        is_shown = self.watch.measurement is not None or (self.counters.step + 1) % self.options.log_every == 0
        norm = self.norm = gradients.global_norm(params) if limit is not None or is_shown else None
        if self.must_check and not self.are_finite(params, norm):  # the one wait for the device in an update
            self.skip(window)
            return False
        if limit is not None and norm is not None:
            gradients.clip(params, limit, norm)

        self.watch.before_step(self.trained.model, params, self.counters.step + 1, window.samples)
        lr = self.optimizer.param_groups[0]["lr"]
        self.lr = lr.clone() if isinstance(lr, Tensor) else lr  # a schedule may fill the tensor with its next value
        self.optimizer.step()
        self.precision.adapt()
        self.pace.step("update", None, self.counters.epoch)
        if self.average is not None:
            with self.modes.evaluation():
                self.average.update()
        self.counters.step += 1
        self.counters.skipped_in_a_row = 0
        self.counters.samples += window.samples
        self.interval.add(window.losses, window.counts, window.samples)
        if (message := self.watch.after_step(self, params, window, norm)) is not None:
            self.report.message(message)
        if self.watch.seeks_origin and self.must_check:
            self.seek(window)
        return True

    def micro_step(self, window: Window) -> None:
        """Forward and backward of the window's next micro-batch, whose gradients add up."""
        index = window.done
        batch, counts = window.batches[index], is_counted(window.planned[index])
        if not counts and self.processes.world == 1:
            window.take(torch.zeros((), device=self.device), 0)
            return
        inputs, target = self.trained.split(batch if self.device.type == "cpu" else move(batch, self.device))
        if not self.wrappers or index == len(window.batches) - 1:
            self.backward(window, inputs, target, counts)
            return
        with without_averaging(self.wrappers):  # only a window's last backward pass averages over the processes
            self.backward(window, inputs, target, counts)

    def backward(self, window: Window, inputs: Any, target: Any, counts: bool) -> None:
        """Adds the gradient of weight · loss."""
        loss, count = self.precision.run(self.forward, inputs, target, counts)
        window.take(loss, count)
        if self.criterion.assumed is not None and not self.has_said_what_is_counted:
            self.say_what_is_counted(window)
        weight = window.weight_of(window.done)
        is_all = not isinstance(weight, Tensor) and weight == 1.0
        self.precision.scaled(loss if is_all else loss * weight).backward()

    def look(self, output: Any, target: Any, loss: Tensor) -> None:
        """What every micro-batch of training shows as it is computed; the watch looks at few."""
        if self.watch.is_looking:
            self.watch.see(output, target, loss, self.criterion.function)

    def are_finite(self, params: list[Tensor], norm: Tensor | None) -> bool:
        """Whether every gradient is finite, those of other processes' shards too."""
        finite = gradients.are_finite(params, norm)
        return self.processes.min(float(finite)) > 0 if self.is_sharded else finite

    def skip(self, window: Window) -> None:
        """Leaves out an update whose gradient is not finite: nothing has changed but the scale of float16."""
        check_targets()  # a class out of range, which no later update can be right about
        options, at = self.options, self.counters
        self.put_back_buffers(window)
        at.skipped += 1
        is_loss_finite = all(math.isfinite(float(loss)) for loss in window.losses)
        is_scale = self.precision.is_searching() and not self.processes.sum([float(not is_loss_finite)])[0]
        if is_scale or options.nonfinite == "ignore":
            self.precision.adapt()
            return
        at.skipped_in_a_row += 1
        found = otherwise = None
        if self.watch.lost.is_searched():
            otherwise = self.blamed_gradient()
            if not self.is_sharded:  # whose forward pass needs all processes, while one may have found something
                otherwise = Finding(f"{otherwise.text}, and is finite when computed again", "finite again")
                found = self.search(window)
        self.put_back_buffers(window)
        self.precision.adapt()
        everywhere = self.processes.gather(found)
        rank = next((rank for rank, finding in enumerate(everywhere) if finding is not None), 0)
        found = everywhere[rank] or otherwise
        self.suspects = window.batches
        what = found.text if found is not None else "not looked into"
        kept_in = self.keep_suspects(what) if self.processes.rank == rank else None
        kept_in = self.processes.gather(kept_in)[rank]
        self.interval.fold()
        told = self.watch.lost_update(found, at.step + 1, float(self.lr), self.interval.history)
        if told is not None:
            where = f" in process {rank}" if self.processes.world > 1 else ""
            text = f"update {at.step + 1:,} left out ({at.skipped_in_a_row} in a row){where}: {told}"
            self.say("trouble", "nonfinite", text + (f"; its batch is in {kept_in}" if kept_in else ""))
        limit = 1 if options.nonfinite == "stop" else options.nonfinite_limit
        if at.skipped_in_a_row >= limit:
            self.reason = "nonfinite"
            intact = f"{self.checkpoint} is intact" if self.checkpoint else "there is no checkpoint"
            text = f"stopped after {limit} in a row; the weights are those of step {at.step:,}, and {intact}"
            self.say("trouble", "nonfinite", text)

    def put_back_buffers(self, window: Window) -> None:
        """The buffers of what is trained as they were before the window."""
        for buffer, kept in zip(self.buffers, window.buffers or (), strict=True):
            buffer.copy_(kept)

    def search(self, window: Window) -> Finding | None:
        """What is not finite first when the micro-batches are computed again, each with the weight that it had."""
        if (found := nonfinite_parameter(self.criterion.owned, " of the loss")) is not None:
            return found
        weights = map(window.weight_of, range(len(window.batches)))
        parts = zip(window.batches, weights, window.counts, strict=True)
        computed = [(batch, weight) for batch, weight, count in parts if is_counted(count)]
        return first_nonfinite(self.trained.model, computed, self.trained, self.precision, self.device)

    def seek(self, window: Window) -> None:
        """Names what makes a loss that is not finite, though the gradients of it are."""
        losses = [float(loss) for loss, count in zip(window.losses, window.counts, strict=True) if is_counted(count)]
        if all(map(math.isfinite, losses)):
            return
        self.watch.seeks_origin = False
        buffers = [buffer.clone() for buffer in self.buffers]
        found = self.search(window)
        for buffer, kept in zip(self.buffers, buffers, strict=True):
            buffer.copy_(kept)
        if found is not None:
            text = f"the loss of update {self.counters.step:,} is not finite, though its gradients are: {found}"
            self.say("trouble", "nonfinite", text)

    def blamed_gradient(self) -> Finding:
        """The gradient that is not finite and that backward came to first: the loss's own before the model's."""
        text = nonfinite_gradient(self.criterion.owned, " of the loss") or nonfinite_gradient(self.trained.model)
        text = text or "a gradient is not finite"
        return Finding(text, text.split(" has ")[0])

    def keep_suspects(self, what: str) -> Path | None:
        """Writes the micro-batches that were not finite to the run's directory; None where that cannot be done."""
        if self.options.directory is None:
            return None
        path = Path(self.options.directory) / "nonfinite" / f"step-{self.counters.step + 1:09}.pt"
        try:
            write(plain({"micro_batches": self.suspects, "what": what}), path)
        except (OSError, TypeError):
            return None
        return path

    # Between updates --------------------------------------------------------------------------------------------------

    def after_update(self, window: Window) -> None:
        """What is due after so many updates, or so many minutes."""
        options, step = self.options, self.counters.step
        if step % options.log_every == 0:
            self.progress()
        is_validated = options.validate_every is not None and step % options.validate_every == 0 and self.validate()
        if is_validated:
            self.pace.step("validation", self.counters.monitored, self.counters.epoch)
        is_due = is_validated if options.checkpoint_every is None else step % options.checkpoint_every == 0
        if is_due or ("save" in window.asked if self.processes.world > 1 else self.is_late()):
            self.save()

    def after_epoch(self) -> None:
        """What is due after each pass over the data."""
        options, at = self.options, self.counters
        at.epoch, at.batch = at.epoch + 1, 0
        self.is_saved = False
        is_due = options.validate_every is None and self.validate()
        if is_due:
            self.pace.step("validation", at.monitored, at.epoch)
        self.pace.step("epoch", at.monitored, at.epoch)
        if options.checkpoint_every is not None or self.checkpoints is None:
            return
        if self.validation is None:
            is_cheap = perf_counter() - self.saved_at >= COSTLY * self.saving_took
            is_due = self.processes.sum([float(is_cheap and self.processes.is_first)])[0] > 0
        if is_due:
            self.save()

    def progress(self) -> None:
        """Brings the sums of the interval from the device, shows them, and begins a new interval."""
        now, total = perf_counter(), self.total_steps()
        interval, at = self.interval, self.counters
        self.is_saved = False
        interval.fold()
        loss, count = self.processes.sum([interval.total, interval.counted])
        at.train_loss = loss / count if count else float("nan")
        steps = at.step - self.steps_before
        left = None if total is None or not steps else (now - self.begun) / steps * max(total - at.step, 0)
        self.report.progress(
            Progress(
                step=at.step,
                total_steps=total,
                epoch=at.epoch,
                loss=at.train_loss,
                lr=float(self.lr),
                grad_norm=None if self.norm is None else float(self.norm),
                samples_per_second=interval.samples / max(now - self.interval_begun, 1e-9),
                seconds=now - self.begun,
                seconds_left=left,
                skipped=at.skipped,
            )
        )
        is_alone = self.processes.world == 1
        history = interval.history if is_alone else interval.history.together(self.processes.sum)
        for message in self.watch.progressed(at.step, total, float(self.lr), at.train_loss, history, is_alone):
            self.report.message(message)
        interval.clear()
        self.interval_begun = perf_counter()

    def validate(self) -> bool:
        """Goes through the validation data, unless that has been done at this step; whether it was done now."""
        at = self.counters
        if self.validation is None or at.validated_step == at.step:
            return False
        begun, at.validated_step, self.is_saved = perf_counter(), at.step, False
        with self.to_be_used():
            values = evaluate(self.trained, self.validation, self.metrics, self.precision, self.processes)
            at.monitored = values[self.options.monitor]
            is_best = self.best.offer(at.monitored, at.step, self.trained)
            if is_best and self.checkpoints is not None:
                self.write_best()
        loss = values.pop("loss")
        seconds = perf_counter() - begun
        on_average = self.average is not None
        numbers = (at.step, at.epoch, loss, values, at.train_loss)
        self.report.validated(Validated(*numbers, is_best, on_average, seconds))
        if (message := self.watch.validated(at.step, loss, at.train_loss)) is not None:
            self.report.message(message)
        self.interval_begun += perf_counter() - begun  # it is no training time
        return True

    @contextmanager
    def to_be_used(self) -> Iterator[None]:
        """The model holds the weights to be used, the average if there is one, and afterwards those of before."""
        with self.modes.evaluation(), nullcontext() if self.average is None else self.average.applied():
            yield

    def write_best(self) -> None:
        """The weights just validated, as best.pt. Collective."""
        weights = plain({**self.trained.state(), "step": self.counters.step})
        weights.setdefault(self.options.monitor, self.best.value)
        if self.processes.is_first:
            self.write(lambda: write(weights, Path(str(self.options.directory)) / "best.pt"))

    def is_late(self) -> bool:
        """Whether so many minutes have passed since the last checkpoint."""
        if self.checkpoints is None or not self.processes.is_first:
            return False
        return perf_counter() - self.saved_at >= 60 * self.options.checkpoint_minutes

    def save(self) -> None:
        """A checkpoint of everything, unless the newest one holds it."""
        if self.checkpoints is None or self.is_saved:
            return
        begun, checkpoints = perf_counter(), self.checkpoints
        with self.modes.evaluation():  # until it is written: what is collected is no copy
            everything = state.collect(self)
            if self.processes.is_first:
                written = self.write(lambda: checkpoints.save(everything, self.counters.step))
                self.checkpoint = written or self.checkpoint
        self.is_saved, self.saved_at = True, perf_counter()
        self.saving_took = self.saved_at - begun
        self.interval_begun += self.saving_took

    def write(self, writing: Callable[[], Any]) -> Any:
        """What `writing` returns, or None where it fails: training goes on, and the person is told."""
        try:
            return writing()
        except OSError as error:
            last = f"the newest checkpoint is {self.checkpoint}" if self.checkpoint else "there is no checkpoint yet"
            self.say("trouble", "checkpoint", f"could not save: {error.strerror or error}; training goes on, {last}")
            return None

    def total_steps(self) -> int | None:
        """Updates of the whole run if none is skipped; None where the data has no length."""
        if self.options.steps is not None:
            return self.options.steps
        if self.source.length is None or self.options.epochs is None:
            return None
        return self.options.epochs * -(-self.source.length // self.options.accumulation)

    def say(self, kind: str, topic: str, text: str) -> None:
        """A sentence for the person."""
        self.report.message(Message(self.counters.step, kind, topic, text))

    def say_what_is_counted(self, window: Window) -> None:
        """Once, what had to be assumed of what the loss counts, where anything depends on it."""
        self.has_said_what_is_counted = True
        if not window.is_alone or self.validation is not None:
            self.say("warning", "count", str(self.criterion.assumed))


def planned_by_shape(trained: Trained, targets: Tensor) -> Callable[[Any], Count]:
    """What the loss counts in a batch, from its shape alone where nothing in any target is ignored or weighted."""
    by_shape = trained.criterion.counts_by_shape(targets)
    return trained.planned if by_shape is None else lambda batch: by_shape(trained.split(batch)[1])


def with_folder(report: Report, directory: Path) -> Report:
    """A report that writes to the run's directory too, unless it does already."""
    reports = report.reports if isinstance(report, Several) else (report,)
    if any(isinstance(each, Folder) and each.path.resolve() == directory.resolve() for each in reports):
        return report
    return Several(*reports, Folder(directory))
