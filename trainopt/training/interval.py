"""The mean loss between two reports, without touching the device in between."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from trainopt.training.counting import Count
from trainopt.training.history import History

LONGEST = 1024  # losses held before they are brought from the device


class Interval:
    """The losses of the updates since the last report, each with what it counts.

    They stay on the device until they are asked for. The sums are made in order, in Python's numbers, so that they do
    not depend on when that was.
    """

    def __init__(self) -> None:
        self.history = History()  # of the whole run
        self._losses: list[Tensor] = []
        self._counts: list[Count] = []
        self.clear()

    def add(self, losses: list[Tensor], counts: list[Count], samples: int) -> None:
        """Takes in the micro-batches of an update that was made."""
        self.samples += samples
        self._losses += losses
        self._counts += counts
        if len(self._losses) >= LONGEST:
            self.fold()

    def fold(self) -> None:
        """Brings what is held from the device, at once, into `total` (the sum of count · loss) and `counted`.

        Micro-batches that count nothing are left out, whatever their loss.
        """
        if not self._losses:
            return
        losses = torch.stack(self._losses).tolist()
        for i, (loss, count) in enumerate(zip(losses, map(float, self._counts), strict=True)):
            if count:
                self.total += loss * count
                self.counted += count
            else:
                losses[i] = math.nan
        self.history.extend(losses)
        self._losses, self._counts = [], []

    def clear(self) -> None:
        """Begins a new interval."""
        self.total = self.counted = 0.0
        self.samples = 0
        self._losses, self._counts = [], []

    def state_dict(self) -> dict[str, Any]:
        """The sums so far."""
        self.fold()
        sums = {"total": self.total, "counted": self.counted, "samples": self.samples}
        return {**sums, "history": self.history.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        self.clear()
        self.total, self.counted, self.samples = state["total"], state["counted"], state["samples"]
        if "history" in state:
            self.history.load_state_dict(state["history"])
