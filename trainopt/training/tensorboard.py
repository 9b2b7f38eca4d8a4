"""A run's numbers for TensorBoard."""

from __future__ import annotations

import os
from typing import Any

from trainopt.training.report import Finished, Message, Progress, Started, Validated


class TensorBoard:
    """A reporter that writes event files for ``tensorboard --logdir``.

    Args:
        path: the folder for them.

    Raises:
        ImportError: the package tensorboard is not installed (``pip install 'trainopt[tensorboard]'``).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._make: Any = SummaryWriter
        self._path = os.fspath(path)
        self._writer: Any = None

    def started(self, event: Started) -> None:
        # What an interrupted run wrote after the checkpoint is hidden by the new one.
        self._writer = self._make(self._path, purge_step=event.step + 1 if event.step else None)

    def progress(self, event: Progress) -> None:
        numbers = {
            "loss/training": event.loss,
            "learning rate": event.lr,
            "gradient norm": event.grad_norm,
            "samples per second": event.samples_per_second,
        }
        for name, number in numbers.items():
            if number is not None:
                self._writer.add_scalar(name, number, event.step)

    def validated(self, event: Validated) -> None:
        self._writer.add_scalar("loss/validation", event.loss, event.step)
        for name, number in event.metrics.items():
            self._writer.add_scalar(name, number, event.step)

    def message(self, event: Message) -> None:
        self._writer.add_text(event.topic, event.text, event.step)

    def finished(self, event: Finished) -> None:
        if self._writer is not None:
            self._writer.close()
