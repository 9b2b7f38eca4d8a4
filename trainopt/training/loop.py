"""The training loop: micro-batches in, updates of the weights, and what is shown and saved between them.

From top to bottom: `fit` is what a person calls, `Loop.train` goes through the epochs, `Loop.update` makes one update.
What is trained, the model and the loss, is in `trainopt.training.trained`; all that a run remembers in
`trainopt.training.state`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from trainopt.training import gradients
from trainopt.training.arguments import Metrics, check_objects, check_validation, validation_size
from trainopt.training.criterion.counting import Count, is_counted
from trainopt.training.data import Source, TensorSource, move, source_of
from trainopt.training.distributed import Processes
from trainopt.training.evaluation import evaluate
from trainopt.training.folder import with_folder
from trainopt.training.in_backward import InBackward
from trainopt.training.options import Options
from trainopt.training.pace import Pace
from trainopt.training.precision import Precision
from trainopt.training.report import Finished, Lines, Message, Progress, Report, Silent, Started, Validated
from trainopt.training.result import Result
from trainopt.training.saving import Saving
from trainopt.training.signals import StopSignals
from trainopt.training.skipping import Skipping
from trainopt.training.state import State
from trainopt.training.tail import Tail
from trainopt.training.trained import Trained, planned_by_shape, without_averaging
from trainopt.training.window import Window


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
            that can be iterated over again in each epoch. Under torchrun a DataLoader's batch is that of all processes
            together, and each loads its share.
        loss: `loss(output, target)`, the mean over what it counts, or the pair (sum, count). None where the model's
            output has its own as `.loss`. What it owns (parameters, buffers) is trained and saved with the model.
        optimizer: any torch optimizer over parameters of the model and the loss whose step needs no closure.
        options: the choices, where they are at hand as an object; else give them by name (`Options`).
        validation: data of the same kinds, evaluated in evaluation mode; plain tensors in order.
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
    options, metrics = Options.of(options, choices), metrics or {}
    device = check_objects(model, optimizer, options, validation, metrics, schedule)
    pace = Pace(schedule, options.schedule_every, validation is not None)
    trained = Trained(model, loss, optimizer, count, split)
    processes = Processes.join(device)
    source = source_of(data, options.batch_size, options.shuffle, processes, options.sharded)
    held_out = None
    if validation is not None:
        size = validation_size(options.batch_size, validation)
        held_out = source_of(validation, size, False, processes, options.sharded, "validation")
        check_validation(held_out)
    planned: Callable[[Any], Count] = trained.planned
    if split is None and isinstance(source, TensorSource) and len(source.tensors) == 2:
        planned = planned_by_shape(trained, source.tensors[1])
    state = State(options, trained, optimizer, schedule, Precision(options.precision, device), source, processes)
    return Loop(state, held_out, metrics, pace, planned, Lines() if report is None else report).run()


class Loop:
    """Runs the epochs of a training run. Building it checks its directory and changes nothing.

    Args:
        state: what is trained, by what, and how far it is.
        validation, metrics, report: as of `fit`.
        pace: steps the schedule.
        planned: what the loss counts in a batch, as far as that is known before it is computed.
    """

    def __init__(
        self,
        state: State,
        validation: Source | None,
        metrics: Metrics,
        pace: Pace,
        planned: Callable[[Any], Count],
        report: Report,
    ) -> None:
        self.state, self.options, self.optimizer, self.trained = state, state.options, state.optimizer, state.trained
        self.source, self.processes, self.precision = state.source, state.processes, state.precision
        self.counters, self.interval, self.watch = state.counters, state.interval, state.watch
        self.criterion = self.trained.criterion
        self.validation, self.metrics, self.pace, self.planned = validation, metrics, pace, planned
        self.trained.look = self.look
        self.saving = Saving(state, self.say)
        self.skipping = Skipping(state, self.say)
        self.report: Report = Silent()
        if self.processes.is_first:
            directory = self.options.directory
            self.report = report if directory is None else with_folder(report, Path(directory))
        self.signals = StopSignals()
        self.forward: Callable[..., tuple[Tensor, Count | None]] = self.trained.forward
        self.wrappers = self.trained.wrappers()  # that average gradients over the processes
        self.must_check = self.options.nonfinite != "ignore" or self.precision.scaler is not None
        self.tail = Tail(state, self.must_check)
        self.in_backward = InBackward(state, self.must_check) if self.options.step_in_backward else None

        self.lr: Any = self.optimizer.param_groups[0]["lr"]  # that the last update used
        self.norm: Tensor | None = None  # of the last update's gradient, unscaled, before clipping
        self.reason: str | None = None  # why the run must end, where an update has found out
        self.has_said_what_is_counted = False
        self.begun = self.interval_begun = perf_counter()
        self.steps_before = 0  # updates made when this process took the run up

    # From the beginning to the end ------------------------------------------------------------------------------------

    def run(self) -> Result:
        """All of it, in any case with the event that says how it ended."""
        reason = "error"
        with self.signals:
            self.start()
            try:
                reason = self.train()
                self.end(reason)
            except BaseException as error:
                reason = type(error).__name__
                raise
            finally:
                self.tail.end()
                if self.in_backward is not None:
                    self.in_backward.end()
                at, best, newest = self.counters, self.state.best, self.saving.newest
                summary = (at.step, at.epoch, reason, at.train_loss, best.value, best.step)
                self.report.finished(Finished(*summary, perf_counter() - self.begun, at.samples, newest))
        average, trained = self.state.average, self.trained
        of_model = None if average is None else average.model_state(trained.model)
        of_loss = None if average is None else average.model_state(trained.criterion.owned)
        return Result(*summary, newest, of_model, self.skipping.suspects, of_loss)

    def start(self) -> None:
        """Carries on from the newest whole checkpoint, or begins."""
        state, at = self.state, self.counters
        saved, corrupt = self.saving.find()
        state.place()
        changes: list[str] = []
        if saved is None:
            state.begin()
        else:
            changes = state.restore(saved, self.saving.newest)
        self.saving.check()
        self.forward = self.trained.parallel(self.processes)
        self.wrappers = self.trained.wrappers(self.forward)
        self.trained.begin()
        if self.in_backward is not None:
            self.in_backward.begin()
        self.begun = self.interval_begun = perf_counter()
        self.steps_before = at.step
        self.report.started(
            Started(
                options=self.options,
                model=type(self.trained.model).__name__,
                parameters=sum(param.numel() for param in self.trained.parameters() if param.requires_grad),
                optimizer=type(self.optimizer).__name__,
                device=str(self.precision.device),
                processes=self.processes.world,
                step=at.step,
                total_steps=self.total_steps(),
                resumed_from=self.saving.newest,
            )
        )
        for path, why in corrupt:
            self.say("warning", "checkpoint", f"{path} was skipped: {why}")
        for change in changes:
            self.say("warning", "resume", change)
        if saved is not None and (reason := self.reason_to_end()) in ("finished", "early stopping"):
            how = "" if reason == "finished" else " by early stopping"
            self.say(
                "warning",
                "resume",
                f"the run in {self.options.directory} is already finished{how}, after step {at.step:,}, and nothing is "
                "trained: to train on, give more epochs or steps; to begin anew, use another directory or "
                "resume=False, once its checkpoints have been moved away",
            )

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
        if options.early_stopping is not None and self.state.best.since >= options.early_stopping:
            return "early stopping"
        is_done = at.epoch >= (options.epochs or 0) if options.steps is None else at.step >= options.steps
        return "finished" if is_done else None

    def windows(self) -> Iterator[Window]:
        """The rest of this epoch in pieces of one update; first the one that was under way, if any."""
        state = self.state
        if state.window is not None:
            yield state.window
        micro_batches = self.source.epoch(state.seed, self.counters.epoch, self.counters.batch)
        while True:
            drawn = list(itertools.islice(micro_batches, self.options.accumulation))
            if self.options.sharded:  # the processes' parts may differ in length: the shortest ends the epoch
                drawn = drawn[: int(self.processes.min(len(drawn)))]
            if not drawn:
                return
            self.counters.batch += len(drawn)
            state.window = Window.of(drawn, self.planned)
            if self.processes.world > 1:
                asks = "stop " * (self.signals.received is not None) + "save" * self.saving.is_late()
                state.window.all_reduce(self.processes, asks)
            yield state.window

    def end(self, reason: str) -> None:
        """The last interval, validation and checkpoint, and the best weights if they were kept."""
        if reason == "nonfinite":  # the last good checkpoint stays as it is
            self.state.modes.eval()
            return
        if reason in ("finished", "early stopping"):
            if self.interval.samples:
                self.progress()
            self.validate()
            if (text := self.watch.lost.summary()) is not None:
                self.say("warning", "nonfinite", text)
            self.tell(self.watch.ended(self.counters.step, self.total_steps(), float(self.lr)))
        self.saving.save()
        self.state.modes.eval()
        if reason in ("SIGTERM", "SIGINT"):
            saved = "no directory was given, so nothing is saved"
            if self.saving.newest is not None:
                saved = f"{self.saving.newest} holds everything: start the same run again to carry on from there"
            self.say("info", "stop", f"stopped by {reason} after step {self.counters.step:,}; {saved}")
        elif self.state.best.weights is not None:
            self.trained.load(self.state.best.weights)

    # One update -------------------------------------------------------------------------------------------------------

    def update(self, window: Window) -> bool:
        """One update of the weights; whether it was made.

        It is not if the gradient is not finite, if the loss counts nothing in the window, or if a signal came between
        two micro-batches: then, and only then, the window stays under way.
        """
        state, at, optimizer = self.state, self.counters, self.optimizer
        if "stop" in window.asked:  # every process knows it: all stop after this update
            self.reason = next(filter(None, self.processes.gather(self.signals.received)))
        self.saving.is_current = False
        if window.is_empty:
            state.window = None
            return False

        # The gradient: the sum of the micro-batches', each times the weight of its mean loss.
        if not window.done:
            gradients.clear(optimizer)
            self.watch.begin(at.step + 1)
            window.buffers = [buffer.clone() for buffer in state.buffers]
        while window.done < len(window.batches):
            self.forward_and_backward(window)
            window.done += 1
            if self.signals.received is not None and self.processes.world == 1 and window.done < len(window.batches):
                return False
        state.window = None
        if self.trained.apart:
            self.processes.average_gradients(self.trained.apart)
        correction = 1.0 if self.criterion.is_exact else window.correction(self.processes)
        if correction is None:  # the loss counted nothing
            return False
        params = gradients.parameters(optimizer)
        gradients.scale(params, correction)
        self.precision.unscale(optimizer)

        # Its norm, whether it is finite, and clipping: in the step, where the optimizer does that.
        tail, limit = self.tail, self.options.clip
        is_shown = self.watch.measurement is not None or (at.step + 1) % self.options.log_every == 0
        tail.prepare(params, self.watch.is_watching, is_shown)
        is_told = tail.measures and not self.must_check  # by the step itself, which may come before a look
        is_wanted = (limit is not None or (is_shown and not is_told)) and not tail.clips and self.in_backward is None
        norm = self.norm = gradients.global_norm(params) if is_wanted else None
        if self.must_check and not tail.skips and not self.are_finite(params, norm):  # waits for the device
            return self.leave_out(window)
        if limit is not None and norm is not None:
            gradients.clip(params, limit, norm)

        # The step, the schedule and the average.
        self.watch.before_step(self.trained.model, params, at.step + 1, window.samples)
        lr = optimizer.param_groups[0]["lr"]
        lr = lr.clone() if isinstance(lr, Tensor) else lr  # a schedule may fill the tensor with its next value
        is_made = tail.step()
        if tail.clips:
            self.norm = optimizer.grad_norm  # type: ignore[attr-defined]
        elif is_told and norm is None:
            self.norm = torch.tensor(tail.gradient_norm, dtype=torch.float64)
        if not is_made:
            return self.leave_out(window)
        self.lr = lr
        self.precision.adapt()
        self.pace.step("update", None, at.epoch)
        if state.average is not None:
            with state.modes.evaluation():
                state.average.update()

        # What is remembered of it, and what the watch has to say.
        at.step += 1
        at.skipped_in_a_row = 0
        at.samples += window.samples
        self.interval.add(window.losses, window.counts, window.samples)
        if self.watch.measurement is not None:
            self.measure(window, params)
        if self.watch.seeks_origin and self.must_check:
            self.skipping.explain_loss(window)
        return True

    def forward_and_backward(self, window: Window) -> None:
        """Adds the gradient of the window's next micro-batch: that of its mean loss, times its weight."""
        index, device = window.done, self.precision.device
        batch, counts = window.batches[index], is_counted(window.planned[index])
        if not counts and self.processes.world == 1:
            window.take(torch.zeros((), device=device), 0)
            return
        inputs, target = self.trained.split(batch if device.type == "cpu" else move(batch, device))
        is_last = index == len(window.batches) - 1  # only a window's last backward pass averages over the processes
        with nullcontext() if is_last or not self.wrappers else without_averaging(self.wrappers):
            loss, count = self.precision.run(self.forward, inputs, target, counts)
            window.take(loss, count)
            if self.criterion.assumed is not None and not self.has_said_what_is_counted:
                self.say_what_is_counted(window)
            if self.in_backward is not None and not self.in_backward.may_begin(loss, window.counts[index]):
                return
            weight = window.weight_of(index)
            is_all = not isinstance(weight, Tensor) and weight == 1.0
            self.precision.scaled(loss if is_all else loss * weight).backward()

    def leave_out(self, window: Window) -> bool:
        """Leaves out an update that is not finite; False, for it is not made."""
        with nullcontext() if self.in_backward is None else self.in_backward.suspended():
            self.reason = self.skipping.skip(window, float(self.lr), self.saving.newest) or self.reason
        return False

    def are_finite(self, params: list[Tensor], norm: Tensor | None) -> bool:
        """Whether every gradient is finite, those of other processes' shards too; the loss, where backward steps."""
        if self.in_backward is not None:
            return self.in_backward.is_finite
        finite = gradients.are_finite(params, norm)
        return self.processes.min(float(finite)) > 0 if self.state.is_sharded else finite

    def look(self, output: Any, target: Any, loss: Tensor) -> None:
        """What every micro-batch of training shows as it is computed; the watch looks at few."""
        if self.watch.is_looking:
            self.watch.see(output, target, loss, self.criterion.function)

    def measure(self, window: Window, params: list[Tensor]) -> None:
        """Gives an update to the watch, which has asked to measure some, and tells what these have shown."""
        evidence = self.watch.after_step(params, window, self.norm, self.trained, self.precision)
        if evidence is not None:
            self.tell(self.watch.measured(self.counters.step, self.total_steps(), evidence, float(self.lr)))

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
        if is_due or ("save" in window.asked if self.processes.world > 1 else self.saving.is_late()):
            self.save()

    def after_epoch(self) -> None:
        """What is due after each pass over the data."""
        options, at = self.options, self.counters
        at.epoch, at.batch = at.epoch + 1, 0
        self.source.end_epoch()
        self.saving.is_current = False
        is_due = options.validate_every is None and self.validate()
        if is_due:
            self.pace.step("validation", at.monitored, at.epoch)
        self.pace.step("epoch", at.monitored, at.epoch)
        if options.checkpoint_every is not None or options.directory is None:
            return
        if is_due or (self.validation is None and self.saving.is_cheap()):
            self.save()

    def save(self) -> None:
        """A checkpoint; the time for it is no training time."""
        self.interval_begun += self.saving.save()

    def progress(self) -> None:
        """Brings the sums of the interval from the device, shows them, and begins a new interval."""
        now, total = perf_counter(), self.total_steps()
        interval, at = self.interval, self.counters
        self.saving.is_current = False
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
                update_ratio=self.tail.update_ratio if self.tail.measures else None,
            )
        )
        is_alone = self.processes.world == 1
        history = interval.history if is_alone else interval.history.together(self.processes.sum)
        for message in self.watch.progressed(at.step, total, float(self.lr), at.train_loss, history, is_alone):
            self.tell(message)
        interval.clear()
        self.interval_begun = perf_counter()

    def validate(self) -> bool:
        """Evaluates the model on the validation data, unless that was done at this step; whether it was done now."""
        state, at = self.state, self.counters
        if self.validation is None or at.validated_step == at.step:
            return False
        self.saving.is_current = False
        begun, at.validated_step = perf_counter(), at.step
        with state.weights_to_use():
            values = evaluate(self.trained, self.validation, self.metrics, self.precision, self.processes)
            at.monitored = values[self.options.monitor]
            is_best = state.best.offer(at.monitored, at.step, self.trained)
            if is_best:
                self.saving.save_best()
        loss = values.pop("loss")
        seconds = perf_counter() - begun
        on_average = state.average is not None
        numbers = (at.step, at.epoch, loss, values, at.train_loss)
        self.report.validated(Validated(*numbers, is_best, on_average, seconds))
        self.tell(self.watch.validated(at.step, loss, at.train_loss))
        self.interval_begun += perf_counter() - begun  # it is no training time
        return True

    def total_steps(self) -> int | None:
        """Updates of the whole run if none is skipped; None where the data has no length."""
        return self.options.total_steps(self.source.length)

    def say(self, kind: str, topic: str, text: str) -> None:
        """A sentence for the person."""
        self.report.message(Message(self.counters.step, kind, topic, text))

    def tell(self, message: Message | None) -> None:
        """What the watch has found, if anything."""
        if message is not None:
            self.report.message(message)

    def say_what_is_counted(self, window: Window) -> None:
        """Once, what had to be assumed of what the loss counts, where anything depends on it."""
        self.has_said_what_is_counted = True
        if not window.is_alone or self.validation is not None:
            self.say("warning", "count", str(self.criterion.assumed))
