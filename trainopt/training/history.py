"""The losses of a run: all of them coarsely, the newest finely.

A judgement over the last quarter of a run and one over its last minute both need about as many numbers, and a run may
have millions of losses. So they are kept as sums over pieces of `PIECE`: the newest `KEPT` of those, and besides pieces
of equal length over the whole run, at most `KEPT`, whose length doubles when there would be more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from operator import mul
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainopt.training.criterion.counting import Count

PIECE, KEPT = 10, 64
LONGEST = 1024  # losses that an interval holds before they are brought from the device


class Piece(NamedTuple):
    """Sums over consecutive losses."""

    length: float  # how many, with those that are not finite or count nothing
    number: float  # how many without those
    total: float
    squares: float

    @classmethod
    def of(cls, losses: Sequence[float]) -> Piece:
        total, squares = sum(losses), sum(map(mul, losses, losses))
        if math.isfinite(squares):
            return cls(len(losses), len(losses), total, squares)
        finite = [loss for loss in losses if math.isfinite(loss * loss)]
        return cls(len(losses), len(finite), sum(finite), sum(map(mul, finite, finite)))

    @classmethod
    def joined(cls, pieces: Sequence[Piece]) -> Piece:
        return cls(*map(sum, zip(*pieces, strict=True))) if pieces else cls(0, 0, 0.0, 0.0)


class Stretch(NamedTuple):
    """What a part of the losses comes to."""

    number: float
    mean: float
    error: float  # twice the standard error of the mean, as if the losses were independent


def stretch_of(piece: Piece) -> Stretch:
    if not piece.number:
        return Stretch(0, math.nan, math.inf)
    mean = piece.total / piece.number
    return Stretch(
        piece.number, mean, 2 * math.sqrt(max(piece.squares / piece.number - mean * mean, 0.0) / piece.number)
    )


class History:
    """Remembers losses in the order in which they come; NaN stands for one that counts nothing.

    What it holds depends on the losses alone, not on how many come at a time.
    """

    def __init__(self) -> None:
        self.length = 0
        self.first = math.nan  # the first loss of all: that of the weights as they were given
        self.rest: list[float] = []  # that do not fill a piece yet
        self.fine: list[Piece] = []
        self.coarse: list[Piece] = []
        self.size = PIECE  # losses in a coarse piece; the last one may have fewer

    def extend(self, losses: Sequence[float]) -> None:
        """Takes in the next losses."""
        if not self.length and losses:
            self.first = losses[0]
        self.length += len(losses)
        self.rest += losses
        while len(self.rest) >= PIECE:
            self._add(Piece.of(self.rest[:PIECE]))
            del self.rest[:PIECE]

    def _add(self, piece: Piece) -> None:
        self.fine.append(piece)
        if len(self.fine) > KEPT:
            del self.fine[0]
        coarse = self.coarse
        if coarse and coarse[-1].length < self.size:
            coarse[-1] = Piece.joined([coarse[-1], piece])
            return
        if len(coarse) == KEPT:
            self.coarse = coarse = [Piece.joined(coarse[i : i + 2]) for i in range(0, KEPT, 2)]
            self.size *= 2
        coarse.append(piece)

    def stretch(self, first: float, last: float = math.inf) -> Stretch:
        """The losses from number `first` to before number `last`: of the pieces whose middle lies between them."""
        pieces, at = self.coarse, 0.0
        if first >= self.length - len(self.rest) - PIECE * len(self.fine):
            pieces, at = self.fine, self.length - len(self.rest) - PIECE * len(self.fine)
        count = total = squares = 0.0
        for piece in pieces:
            if first <= at + piece.length / 2 < last:
                count, total, squares = count + piece.number, total + piece.total, squares + piece.squares
            at += piece.length
        return stretch_of(Piece(count, count, total, squares))

    def latest_peak(self) -> float:
        """The largest of the newest losses that are finite: of the last few, or the mean of a piece before them."""
        means = [piece.total / piece.number for piece in self.fine if piece.number]
        return max([*means[-1:], *(loss for loss in self.rest if math.isfinite(loss))], default=-math.inf)

    def peak(self) -> float:
        """The largest mean of a fine piece."""
        return max((piece.total / piece.number for piece in self.fine if piece.number), default=-math.inf)

    def together(self, summed: Callable[[Sequence[float]], list[float]]) -> History:
        """That of several processes that have as many losses each, by a function that sums over the processes."""
        values = [value for piece in self.coarse + self.fine for value in piece]
        world, first, *sums = summed([1.0, self.first, *values])
        pieces = [Piece(sums[i] / world, *sums[i + 1 : i + 4]) for i in range(0, len(sums), 4)]
        result = History()
        result.first = first / world
        result.length, result.size, result.rest = self.length, self.size, [math.nan] * len(self.rest)
        result.coarse, result.fine = pieces[: len(self.coarse)], pieces[len(self.coarse) :]
        return result

    def state_dict(self) -> dict[str, Any]:
        """All of it, as plain numbers."""
        return {
            "first": self.first,
            "rest": list(self.rest),
            "fine": [list(piece) for piece in self.fine],
            "coarse": [list(piece) for piece in self.coarse],
            "size": self.size,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave; TypeError or ValueError for what it cannot have given."""
        self.first, self.rest, self.size = float(state["first"]), [*map(float, state["rest"])], int(state["size"])
        self.fine, self.coarse = ([Piece(*map(float, piece)) for piece in state[name]] for name in ("fine", "coarse"))
        self.length = round(sum(piece.length for piece in self.coarse)) + len(self.rest)


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
