"""Whether the losses of a run give cause for suspicion, from the losses alone.

Each rule compares the mean loss of a window, the newest quarter of the run, with something that has a meaning: the loss
of guessing, the first loss, the best so far, the window's own scatter. A window, so that one bad batch is nothing; the
scatter, so that noise is no fall and no rise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from trainopt.training.history import History, Stretch

EARLIEST = 30  # updates before which nothing is suspected
NARROWEST, WIDEST = 20, 500  # updates in a window
PATIENCE = (
    300  # updates, at most, after which a loss should have begun to fall; a quarter of the run where it is shorter
)
SPIKE = 3.0  # times the loss of guessing and the first one: a healthy run never gets there
MARKS = 64  # moments that are remembered


class Mark(NamedTuple):
    """The mean loss of the window before a moment of the run."""

    step: int
    loss: float
    error: float
    lr: float


@dataclass(frozen=True)
class Suspicion:
    """What seems wrong.

    `cause` is "worse": the loss is above that of guessing and above the first one; "spiked": it has been many times
    that of guessing, and falls again; "rising": far above what it was at
    such a learning rate; "flat": it has hardly fallen since the first update; "stalled": not in the second half of the
    run so far; "dead": nothing, but units are dead.
    """

    cause: str
    now: float  # mean of the window
    before: float  # what it is compared with
    before_step: int
    has_moved: bool = True  # for "flat": whether the loss was another at first
    is_certain: bool = True  # for "flat": no fall can hide in the scatter
    projected: float = math.inf  # for "flat": the fall to the end of the run at this pace, against the scale, at most


class Losses:
    """The rules, and what they remember."""

    def __init__(self) -> None:
        self.marks: list[Mark] = []
        self.peak = -math.inf  # the largest mean of a few losses in a row
        self.bound = math.inf  # a loss above which is worse than at first and worse than guessing
        self.scale = math.nan  # what a fall or a rise is measured against
        self.scatter = 0.0  # of the mean of a few losses in a row
        self.was_worse = False

    @property
    def has_spiked(self) -> bool:
        """Whether the loss has been well above both the first one and that of guessing."""
        return self.peak > self.bound + 0.1 * self.scale + self.scatter

    @property
    def is_low(self) -> bool:
        """Whether the loss has nearly gone, so that zero gradients mean that there is nothing left to learn."""
        return bool(self.marks) and self.marks[-1].loss < 0.02 * self.scale

    def judge(
        self, step: int, total: int | None, lr: float, history: History, reference: float | None, noise: float | None
    ) -> Suspicion | None:
        """The strongest suspicion after update `step`.

        Args:
            reference: the loss of guessing, where it is known.
            noise: standard error of the first loss, where it is known.
        """
        if history.length < step:  # from a checkpoint of an older version, without the losses up to it
            return None
        per_update = history.length / step
        width = min(max(step / 4, NARROWEST), WIDEST) * per_update
        end = history.length
        now = history.stretch(end - width)
        older, newer = history.stretch(end - width, end - width / 2), history.stretch(end - width / 2)
        self.peak = max(self.peak, history.peak())
        first = history.first
        if step < EARLIEST or not now.number or not math.isfinite(first):
            return None
        self.bound = first + (0.25 * abs(first) if noise is None else 3 * noise)
        self.bound = max(self.bound, -math.inf if reference is None else reference)
        self.scale = scale = abs(first) if reference is None else reference
        self.scatter = now.error * math.sqrt(now.number / 10)
        rises = bool(self.marks) and lr > self.marks[-1].lr * 1.001
        marks = self.marks
        self.marks = [*(marks if len(marks) < MARKS else marks[::2]), Mark(step, now.mean, now.error, lr)]
        patience = PATIENCE / 2 if total is None else min(max(total / 4, EARLIEST), PATIENCE)
        is_falling = newer.mean < older.mean - max(older.error, newer.error)

        was_worse, self.was_worse = self.was_worse, now.mean > self.bound + now.error + 0.05 * abs(self.bound)
        if self.was_worse:
            falls_fast = newer.mean < 0.8 * older.mean
            if step >= patience or (was_worse and not falls_fast):
                return Suspicion("worse", now.mean, first, 0)
        is_back = reference is not None and now.mean < 0.5 * reference  # then it was a spike that did no harm
        if reference is not None and self.peak > SPIKE * max(reference, first) and marks and not is_back:
            return Suspicion("spiked", self.peak, first, 0)
        if self.was_worse:
            return None
        if (found := self.rise(marks, step, lr, now)) is not None:
            if is_falling and step - found.before_step < max(patience, step / 2):
                return None
            return found
        if step < patience or (rises and step < (total or 4 * patience) / 2):
            return None
        if now.mean < 0.25 * scale:  # most has been learned: what is left may be noise
            return None
        start = history.stretch(0, width)
        if self.has_spiked:  # then the first window says nothing
            if is_falling:
                return None
            start = Stretch(start.number, first if reference is None else reference, 0.0)
        fall, doubt = start.mean - now.mean, start.error + now.error
        pace = (fall + doubt / 2) / max(step - width / per_update, 1)
        if is_falling and (older.mean - newer.mean) / (width / per_update / 2) > 1.5 * pace:
            return None  # it falls faster and faster
        projected = pace * (total or 4 * step) / scale if scale else math.inf
        if fall - doubt < 0.02 * scale or projected < 0.2:
            certain = fall + doubt < 0.02 * scale and not is_falling
            moved = abs(first - now.mean) > 0.02 * scale + now.error + (
                3 * noise if noise is not None else 0.25 * abs(first)
            )
            return Suspicion("flat", now.mean, start.mean, 0, moved, certain, projected)
        middle = history.stretch(end / 2 - width, end / 2)
        if step >= 2 * patience and middle.mean - now.mean < 0.01 * scale + now.error:
            return Suspicion("stalled", now.mean, middle.mean, step // 2)
        return None

    def as_it_is(self, history: History, step: int) -> Suspicion | None:
        """The state of a loss that is no cause for suspicion: "flat" where it is still nearly what it was at first,
        else "dead"."""
        if not self.marks:
            return None
        now = self.marks[-1].loss
        return Suspicion("flat" if now > 0.9 * self.scale else "dead", now, history.first, 0)

    def rise(self, marks: list[Mark], step: int, lr: float, now: Stretch) -> Suspicion | None:
        """A loss that is half as high again as it was at such a learning rate, or half of what was gained is lost."""
        low = now.mean - now.error
        peers = [mark for mark in marks if mark.lr >= lr / 2]
        if peers:
            peer = min(peers, key=lambda mark: mark.loss)
            if low - peer.loss - peer.error > max(0.1 * self.scale, 0.5 * abs(peer.loss)):
                return Suspicion("rising", now.mean, peer.loss, peer.step)
        if marks:
            best = min(marks, key=lambda mark: mark.loss)
            if low - best.loss - best.error > max(0.1 * self.scale, 0.5 * (self.bound - best.loss)):
                return Suspicion("rising", now.mean, best.loss, best.step)
        return None

    def state_dict(self) -> dict[str, Any]:
        """All that is remembered, as plain numbers and lists."""
        return {**vars(self), "marks": [list(mark) for mark in self.marks]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave; TypeError or ValueError for what it cannot have given."""
        self.marks = [Mark(int(step), *map(float, numbers)) for step, *numbers in state["marks"]]
        self.peak, self.bound, self.scale, self.scatter = (
            float(state[name]) for name in ("peak", "bound", "scale", "scatter")
        )
        self.was_worse = bool(state["was_worse"])
