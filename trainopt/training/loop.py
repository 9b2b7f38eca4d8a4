"""The training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from trainopt.training.options import Options
from trainopt.training.report import Finished, Lines, Progress, Report, Started


@dataclass(frozen=True)
class Result:
    """How a run ended. The model holds the trained weights: the best ones where `early_stopping` was given."""

    step: int  # updates made in the whole run
    epoch: int
    reason: str  # as in `Finished`
    loss: float
    best: float | None
    best_step: int | None
    checkpoint: Path | None
    average: dict[str, Tensor] | None  # the moving average, as a state dict of the model


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
    count: Callable[[Any], int | Tensor] | None = None,
    split: Callable[[Any], tuple[Any, Any]] | None = None,
    **choices: Any,
) -> Result:
    """Trains `model`: `fit(model, loader, loss, optimizer, epochs=3)`.

    Args:
        model: on its device. Its output for a batch's inputs goes to the loss.
        data: a DataLoader, a tuple of tensors (then `batch_size` says how they are cut), or any iterable of batches
            that can be gone through again each epoch.
        loss: `loss(output, target)`, the mean over what it counts.
        optimizer: any torch optimizer over the model's parameters.
        options: the choices, where they are at hand as an object; else give them by name (`Options`).
        validation: data of the same kinds, gone through in order, in evaluation mode.
        metrics: by name, `metric(output, target)`: the mean over the samples of a batch, a number or 0-dim tensor.
        schedule: anything with `step()`, `state_dict()` and `load_state_dict()`, a torch LRScheduler for one; stepped
            once after every update, not after a skipped one.
        report: receives what happens; lines on standard output by default.
        count: how many the loss counts in a target (tokens, samples). By default those that are not the loss's
            `ignore_index`, or else the samples.
        split: `(inputs, target)` of a batch, which is such a pair by default. Inputs that are a tuple are given to the
            model as its arguments, those that are a dict as its keyword arguments.
    """
    chosen = options or Options(**choices)
    report = report or Lines()
    feed = (
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), chosen.batch_size, chosen.shuffle)
        if isinstance(data, tuple)
        else data
    )
    total = chosen.steps or (chosen.epochs or 0) * len(feed)
    start = perf_counter()
    report.started(
        Started(
            chosen,
            type(model).__name__,
            sum(p.numel() for p in model.parameters()),
            type(optimizer).__name__,
            "cpu",
            1,
            0,
            total,
            None,
        )
    )
    step, epoch, value = 0, 0, float("nan")
    while step < total:
        for inputs, target in feed:
            optimizer.zero_grad()
            error = loss(model(inputs), target)
            error.backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
            step += 1
            if step % chosen.log_every == 0 or step == total:
                value = error.item()
                report.progress(
                    Progress(
                        step,
                        total,
                        epoch,
                        value,
                        optimizer.param_groups[0]["lr"],
                        None,
                        0.0,
                        perf_counter() - start,
                        None,
                        0,
                    )
                )
            if step == total:
                break
        epoch += 1
    report.finished(Finished(step, epoch, "finished", value, None, None, perf_counter() - start, 0, None))
    return Result(step, epoch, "finished", value, None, None, None, None)
