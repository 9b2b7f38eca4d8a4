"""The training loop: micro-batches in, updates of the weights, and what is shown and saved between them.

From top to bottom: `fit` is what a person calls, `Loop.train` goes through the epochs, `Loop.update` makes one update.
What a run consists of and how it begins is in `trainopt.training.run`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainopt.functional import check_targets
from trainopt.training import gradients, state
from trainopt.training.checkpoint import plain, write
from trainopt.training.counting import Count, is_counted
from trainopt.training.data import move
from trainopt.training.evaluation import evaluate
from trainopt.training.nonfinite import Finding, first_nonfinite, nonfinite_gradient, tensors_in
from trainopt.training.options import Options
from trainopt.training.report import Finished, Lines, Progress, Report, Validated
from trainopt.training.run import Run
from trainopt.training.window import Window


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


def fit(
    model: nn.Module,
    data: Any,
    loss: Callable[[Any, Any], Tensor],
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
        loss: `loss(output, target)`, the mean over what it counts.
        optimizer: any torch optimizer over the model's parameters whose step needs no closure.
        options: the choices, where they are at hand as an object; else give them by name (`Options`).
        validation: data of the same kinds, gone through in evaluation mode; plain tensors in order.
        metrics: by name, `metric(output, target)`: the mean over the samples of a batch, a number or 0-dim tensor.
        schedule: anything with `step()`, `state_dict()` and `load_state_dict()`, a torch LRScheduler for one; stepped
            once after every update, not after a skipped one.
        report: receives what happens; lines on standard output by default.
        count: how many the loss counts in a target (tokens, samples). By default those that are not the loss's
            `ignore_index`, or else the samples (`trainopt.training.counting`). A micro-batch with a count of 0 is left
            out, unless the count is a tensor on an accelerator: the gradient of its loss must be finite then.
        split: `(inputs, target)` of a batch, which is such a pair by default. Inputs that are a tuple or list are given
            to the model as its arguments, those that are a dict as its keyword arguments.

    Raises:
        ValueError, TypeError: for what cannot be right, naming it, before anything is written or changed.
    """
    chosen = Options.of(options, choices)
    report = report or Lines()
    loop = Loop(model, data, loss, optimizer, chosen, validation, metrics or {}, schedule, report, count, split)
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
            seconds = perf_counter() - loop.begun
            best, checkpoint = loop.best, loop.checkpoint
            summary = (loop.step, loop.epoch, reason, loop.train_loss, best.value, best.step)
            loop.report.finished(Finished(*summary, seconds, loop.samples, checkpoint))
    average = None if loop.average is None else loop.average.model_state()
    return Result(*summary, checkpoint, average, loop.suspects)


class Loop(Run):
    """A run, gone through."""

    def train(self) -> str:
        """Epoch after epoch, window after window; returns why it ended."""
        while (reason := self.reason_to_end()) is None:
            updates, first = self.step + self.skipped, self.batch
            for window in self.windows():
                if self.update(window):
                    self.after_update()
                if (reason := self.reason_to_end()) is not None:
                    return reason
            if first == 0 and self.step + self.skipped == updates:
                raise ValueError("an epoch held nothing that the loss counts: is data empty, or every target ignored?")
            self.epoch, self.batch = self.epoch + 1, 0
            if self.options.validate_every is None:
                self.validate()
        return reason

    def reason_to_end(self) -> str | None:
        """Why the run ends here; None if it goes on."""
        options = self.options
        if self.reason is not None:
            return self.reason
        if self.signals.received is not None and self.processes.world == 1:
            return self.signals.received
        if options.early_stopping is not None and self.best.since >= options.early_stopping:
            return "early stopping"
        is_done = self.epoch >= (options.epochs or 0) if options.steps is None else self.step >= options.steps
        return "finished" if is_done else None

    def windows(self) -> Iterator[Window]:
        """The rest of this epoch in pieces of one update; first the one that was under way, if any."""
        if self.window is not None:
            yield self.window
        micro_batches = self.source.epoch(self.seed, self.epoch, self.batch)
        while True:
            drawn = list(itertools.islice(micro_batches, self.options.accumulation))
            if self.options.sharded:  # the processes' parts may differ in length: the shortest ends the epoch
                drawn = drawn[: int(self.processes.min(len(drawn)))]
            if not drawn:
                return
            self.batch += len(drawn)
            self.window = Window.of(drawn, self.task.count)
            if self.processes.world > 1:
                self.window.share(self.processes, asks_to_stop=self.signals.received is not None)
            yield self.window

    # One update -------------------------------------------------------------------------------------------------------

    def update(self, window: Window) -> bool:
        """One update of the weights; whether it was made.

        It is not if the gradient is not finite, if the loss counts nothing in the window, or if a signal came between
        two micro-batches: then, and only then, the window stays under way.
        """
        if window.asked_to_stop:  # every process knows it: all stop after this update
            self.reason = next(filter(None, self.processes.gather(self.signals.received)))
        if window.is_empty:
            self.window = None
            return False
        if not window.done:
            gradients.clear(self.optimizer)
            self.watch.begin(self.step + 1)
            window.buffers = [buffer.clone() for buffer in self.buffers]
        while window.done < len(window.batches):
            window.losses.append(self.micro_step(window))
            window.done += 1
            if self.signals.received is not None and self.processes.world == 1 and window.done < len(window.batches):
                return False
        self.window = None

        self.precision.unscale(self.optimizer)
        params = gradients.parameters(self.optimizer)
        limit = self.options.clip
        is_shown = self.watch.measurement is not None or (self.step + 1) % self.options.log_every == 0
        norm = self.norm = gradients.global_norm(params) if limit is not None or is_shown else None
        if self.must_check and not gradients.are_finite(params, norm):  # the one wait for the device in an update
            self.skip(window)
            return False
        if limit is not None and norm is not None:
            gradients.clip(params, limit, norm)

        self.watch.before_step(self.module, params, self.step + 1, window.samples)
        lr = self.optimizer.param_groups[0]["lr"]
        self.lr = lr.clone() if isinstance(lr, Tensor) else lr  # a schedule may fill the tensor with its next value
        self.optimizer.step()
        self.precision.adapt()
        if self.schedule is not None:
            self.schedule.step()
        if self.average is not None:
            self.average.update()
        self.step += 1
        self.skipped_in_a_row = 0
        self.samples += window.samples
        self.interval.add(window.losses, window.counts, window.samples)
        if (message := self.watch.after_step(self, params, window, norm)) is not None:
            self.report.message(message)
        if self.watch.seeks_origin and self.must_check:
            self.seek(window)
        return True

    def micro_step(self, window: Window) -> Tensor:
        """Forward and backward of the window's next micro-batch, whose gradients add up; returns its loss."""
        batch, weight = window.batches[window.done], window.weights[window.done]
        counts = isinstance(weight, Tensor) or weight > 0
        if not counts and self.processes.world == 1:
            return torch.zeros((), device=self.device)
        inputs, target = self.task.split(batch if self.device.type == "cpu" else move(batch, self.device))
        is_last = window.done == len(window.batches) - 1
        if is_last or not isinstance(self.model, DistributedDataParallel):
            return self.backward(inputs, target, weight, counts)
        with self.model.no_sync():  # only the last backward pass of a window averages the gradients over the processes
            return self.backward(inputs, target, weight, counts)

    def backward(self, inputs: Any, target: Any, weight: float | Tensor, counts: bool) -> Tensor:
        """Adds the gradient of weight · loss; returns the loss."""
        loss = self.precision.run(self.forward, inputs, target, counts)
        is_all = not isinstance(weight, Tensor) and weight == 1.0
        self.precision.scaled(loss if is_all else loss * weight).backward()
        return loss.detach()

    def forward(self, inputs: Any, target: Any, counts: bool) -> Tensor:
        """The loss, or a zero that depends on the model: its gradient is zero, but the other processes wait for it."""
        output = self.task.output(self.model, inputs)
        if counts:
            loss = self.task.loss(output, target)
            if self.watch.is_looking:
                self.watch.see(output, target, loss, self.task.loss)
            return loss
        return torch.stack([tensor.sum() for tensor in tensors_in(output)]).sum() * 0.0

    def skip(self, window: Window) -> None:
        """Leaves out an update whose gradient is not finite: nothing has changed but the scale of float16."""
        check_targets()  # a class out of range, which no later update can be right about
        options = self.options
        self.put_back_buffers(window)
        self.skipped += 1
        is_loss_finite = all(math.isfinite(float(loss)) for loss in window.losses)
        is_scale = self.precision.is_searching() and not self.processes.sum([float(not is_loss_finite)])[0]
        if is_scale or options.nonfinite == "ignore":
            self.precision.adapt()
            return
        self.skipped_in_a_row += 1
        found = otherwise = None
        if self.watch.lost.is_searched():
            otherwise = Finding(f"{nonfinite_gradient(self.module)}, and is finite when computed again", "finite again")
            found = self.search(window)
        self.put_back_buffers(window)
        self.precision.adapt()
        everywhere = self.processes.gather(found)
        rank = next((rank for rank, finding in enumerate(everywhere) if finding is not None), 0)
        found = everywhere[rank] or otherwise
        self.suspects = window.batches
        kept_in = (
            self.keep_suspects(found.text if found else "not looked into") if self.processes.rank == rank else None
        )
        kept_in = self.processes.gather(kept_in)[rank]
        self.interval.fold()
        text = self.watch.lost_update(found, self.step + 1, float(self.lr), self.interval.history)
        if text is not None:
            where = f" in process {rank}" if self.processes.world > 1 else ""
            text = f"update {self.step + 1:,} left out ({self.skipped_in_a_row} in a row){where}: {text}"
            self.say("trouble", "nonfinite", text + (f"; its batch is in {kept_in}" if kept_in else ""))
        limit = 1 if options.nonfinite == "stop" else options.nonfinite_limit
        if self.skipped_in_a_row >= limit:
            self.reason = "nonfinite"
            intact = f"{self.checkpoint} is intact" if self.checkpoint else "there is no checkpoint"
            text = f"stopped after {limit} in a row; the weights are those of step {self.step:,}, and {intact}"
            self.say("trouble", "nonfinite", text)

    def put_back_buffers(self, window: Window) -> None:
        """The model's buffers as they were before the window."""
        for buffer, kept in zip(self.buffers, window.buffers or (), strict=True):
            buffer.copy_(kept)

    def search(self, window: Window) -> Finding | None:
        """What is not finite first when the micro-batches are computed again, each with the weight that it had."""
        parts = zip(window.batches, window.weights, window.counts, strict=True)
        computed = [(batch, weight) for batch, weight, count in parts if is_counted(count)]
        return first_nonfinite(self.module, computed, self.task, self.precision, self.device)

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
            text = f"the loss of update {self.step:,} is not finite, though its gradients are: {found}"
            self.say("trouble", "nonfinite", text)

    def keep_suspects(self, what: str) -> Path | None:
        """Writes the micro-batches that were not finite to the run's directory; None where that cannot be done."""
        if self.options.directory is None:
            return None
        path = Path(self.options.directory) / "nonfinite" / f"step-{self.step + 1:09}.pt"
        try:
            write(plain({"micro_batches": self.suspects, "what": what}), path)
        except (OSError, TypeError):
            return None
        return path

    # Between updates --------------------------------------------------------------------------------------------------

    def after_update(self) -> None:
        """What is due after so many updates."""
        options = self.options
        if self.step % options.log_every == 0:
            self.progress()
        if options.validate_every is not None and self.step % options.validate_every == 0:
            self.validate()
        if self.step % options.checkpoint_every == 0:
            self.save()

    def progress(self) -> None:
        """Brings the sums of the interval from the device, shows them, and begins a new interval."""
        now, total = perf_counter(), self.total_steps()
        interval = self.interval
        interval.fold()
        loss, count = self.processes.sum([interval.total, interval.counted])
        self.train_loss = loss / count if count else float("nan")
        steps = self.step - self.steps_before
        left = None if total is None or not steps else (now - self.begun) / steps * max(total - self.step, 0)
        self.report.progress(
            Progress(
                step=self.step,
                total_steps=total,
                epoch=self.epoch,
                loss=self.train_loss,
                lr=float(self.lr),
                grad_norm=None if self.norm is None else float(self.norm),
                samples_per_second=interval.samples / max(now - self.interval_begun, 1e-9),
                seconds=now - self.begun,
                seconds_left=left,
                skipped=self.skipped,
            )
        )
        is_alone = self.processes.world == 1
        history = interval.history if is_alone else interval.history.together(self.processes.sum)
        for message in self.watch.progressed(self.step, total, float(self.lr), self.train_loss, history, is_alone):
            self.report.message(message)
        interval.clear()
        self.interval_begun = perf_counter()

    def validate(self) -> None:
        """Goes through the validation data, unless that has been done at this step."""
        if self.validation is None or self.validated_step == self.step:
            return
        begun, self.validated_step = perf_counter(), self.step
        with nullcontext() if self.average is None else self.average.applied():
            arguments = (self.task, self.metrics, self.precision, self.processes)
            values = evaluate(self.module, self.validation, *arguments)
            is_best = self.best.offer(values[self.options.monitor], self.step, self.module)
            if is_best and self.checkpoints is not None and self.processes.is_first:
                self.write_best()
        loss = values.pop("loss")
        seconds = perf_counter() - begun
        on_average = self.average is not None
        numbers = (self.step, self.epoch, loss, values, self.train_loss)
        self.report.validated(Validated(*numbers, is_best, on_average, seconds))
        if (message := self.watch.validated(self.step, loss, self.train_loss)) is not None:
            self.report.message(message)
        self.interval_begun += perf_counter() - begun  # it is no training time

    def write_best(self) -> None:
        """The weights just validated, as best.pt."""
        weights = {"model": self.module.state_dict(), "step": self.step, self.options.monitor: self.best.value}
        self.write(lambda: write(plain(weights), Path(str(self.options.directory)) / "best.pt"))

    def save(self) -> None:
        """A checkpoint of everything."""
        if self.checkpoints is None:
            return
        begun, checkpoints = perf_counter(), self.checkpoints
        everything = state.collect(self)
        if self.processes.is_first:
            self.checkpoint = self.write(lambda: checkpoints.save(everything, self.step)) or self.checkpoint
        self.interval_begun += perf_counter() - begun

    def write(self, writing: Callable[[], Any]) -> Any:
        """What `writing` returns, or None where it fails: training goes on, and the person is told."""
        try:
            return writing()
        except OSError as error:
            last = f"the newest checkpoint is {self.checkpoint}" if self.checkpoint else "there is no checkpoint yet"
            self.say("trouble", "checkpoint", f"could not save: {error.strerror or error}; training goes on, {last}")
            return None

    def end(self, reason: str) -> None:
        """The last interval, validation and checkpoint, and the best weights if they were kept."""
        if reason == "nonfinite":  # the last good checkpoint stays as it is
            return
        if reason in ("finished", "early stopping"):
            if self.interval.samples:
                self.progress()
            self.validate()
            if (text := self.watch.lost.summary()) is not None:
                self.say("warning", "nonfinite", text)
            if (message := self.watch.ended(self.step, self.total_steps(), float(self.lr))) is not None:
                self.report.message(message)
        self.save()
        if reason in ("SIGTERM", "SIGINT"):
            saved = "no directory was given, so nothing is saved"
            if self.checkpoint is not None:
                saved = f"{self.checkpoint} holds everything: start the same run again to carry on from there"
            self.say("info", "stop", f"stopped by {reason} after step {self.step:,}; {saved}")
        elif self.best.weights is not None:
            self.module.load_state_dict(self.best.weights)
