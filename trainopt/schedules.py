"""Schedules: what a learning rate, or any other option of an optimizer, is multiplied by, as a function of the step.

    from trainopt.schedules import cosine, warmup

    curve = warmup(100).then(cosine(until=1000, floor=0.1))
    curve(550)  # 0.55, the factor after 550 completed optimizer steps

A curve is a value: immutable, comparable, picklable, with no memory of where it was. Its argument is the number of
completed optimizer steps, so the first of N updates is made with ``curve(0)`` and the last with ``curve(N - 1)``. Step
numbers (`until`, `boundaries`) count from the beginning of training, wherever a curve stands in a chain; lengths
(`steps`, `every`, `period`, `timescale`) count from where the curve begins. After its end a curve keeps its last value.

`trainopt.Schedule` applies curves to an optimizer. Their names are lower-case, for they are read as functions.
"""

from __future__ import annotations

import bisect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, ClassVar, SupportsIndex

from trainopt.checks import number, one_of, whole


class Curve(ABC):
    """A factor as a function of the number of completed optimizer steps."""

    def __call__(self, step: SupportsIndex) -> float:
        """The factor after `step` completed steps, a whole number of at least 0."""
        return self.at(whole(self, "step", step), 0)

    def then(self, following: Curve) -> Curve:
        """This curve up to its end, and `following` from there on.

        Raises:
            ValueError: this curve has no end, or `following` would end before it.
        """
        return chain(self, following)

    @abstractmethod
    def at(self, step: int, start: int) -> float:
        """The factor after `step` completed steps, if this curve began after `start`."""

    @abstractmethod
    def ends(self, start: int) -> int | None:
        """After how many completed steps this curve is at its end, if it began after `start`; None if it has none."""


class Limited(Curve):
    """A curve of this module, whose fields are checked by their names when it is made."""

    #: By the fields' names; a curve may have its own.
    limits: ClassVar[dict[str, Callable[[Any, str, Any], Any]]] = {
        **dict.fromkeys(("until", "steps"), whole),
        **dict.fromkeys(("period", "cycles", "every", "timescale"), partial(whole, low=1)),
        **dict.fromkeys(("start", "peak", "end", "factor"), number),
        **dict.fromkeys(("power", "fraction", "mult", "gamma"), partial(number, above=0)),
        **dict.fromkeys(("floor", "rise"), partial(number, to=1)),
    }

    def __post_init__(self) -> None:
        for each in fields(self):  # type: ignore[arg-type]
            value = getattr(self, each.name)
            if each.name in self.limits and (value is not None or each.default is not None):
                self.limits[each.name](self, each.name, value)


@dataclass(frozen=True)
class chain(Curve):
    """One curve after another: what `Curve.then` returns."""

    first: Curve
    second: Curve

    def __post_init__(self) -> None:
        if not isinstance(self.second, Curve):
            raise TypeError(f"then: {self.second!r} is not a curve of trainopt.schedules")
        self.ends(0)

    def at(self, step: int, start: int) -> float:
        middle = self._middle(start)
        return self.first.at(step, start) if step < middle else self.second.at(step, middle)

    def ends(self, start: int) -> int | None:
        return self.second.ends(self._middle(start))

    def _middle(self, start: int) -> int:
        middle = self.first.ends(start)
        if middle is None:
            raise ValueError(f"then: {self.first!r} has no end for {self.second!r} to follow; give it one")
        return middle

    def __repr__(self) -> str:
        return f"{self.first!r}.then({self.second!r})"


# From where the curve begins to `until` -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stretch(Limited):
    """A curve that is given by how much of the way to `until` completed steps is done."""

    until: int

    def at(self, step: int, start: int) -> float:
        return self.shape(min((step - start) / (self.until - start), 1.0) if step < self.until else 1.0)

    def ends(self, start: int) -> int:
        return not_before(start, self, self.until)

    @abstractmethod
    def shape(self, progress: float) -> float:
        """The factor at this part of the way, from 0 to 1."""


@dataclass(frozen=True)
class linear(Stretch):
    """From the factor `start` (default 1) to `end` (default 0) in a straight line; torch's LinearLR."""

    start: float = 1.0
    end: float = 0.0

    def shape(self, progress: float) -> float:
        return mix(self.start, self.end, progress)


@dataclass(frozen=True)
class polynomial(Stretch):
    """(1 − t/T)^power from 1 to `floor` (default 0); with floor 0, torch's PolynomialLR.

    Args:
        power: greater than 0 (default 1, a straight line).
        floor: the factor at the end, from 0 to 1.
    """

    power: float = 1.0
    floor: float = 0.0

    def shape(self, progress: float) -> float:
        return mix(self.floor, 1.0, (1 - progress) ** self.power)


@dataclass(frozen=True)
class exponential_to(Stretch):
    """fraction^(t/T): from 1 to `fraction`, greater than 0, by the same ratio in every step."""

    fraction: float

    def shape(self, progress: float) -> float:
        return float(self.fraction**progress)


@dataclass(frozen=True)
class Fall(Stretch):
    """A curve from 1 to `floor`."""

    floor: float = 0.0

    def shape(self, progress: float) -> float:
        return mix(1.0, self.floor, self.fallen(progress))

    @abstractmethod
    def fallen(self, progress: float) -> float:
        """How much of the way down is done, from 0 to 1."""


@dataclass(frozen=True)
class cosine(Fall):
    """Half a cosine from 1 to `floor` (from 0 to 1, default 0); up to its end, torch's CosineAnnealingLR.

    Source: Loshchilov & Hutter, SGDR: Stochastic gradient descent with warm restarts, 2017, arXiv:1608.03983, eq. 5.
    """

    def fallen(self, progress: float) -> float:
        return half_cosine(progress)


@dataclass(frozen=True)
class one_minus_sqrt(Fall):
    """1 − √(t/T) from 1 to `floor` (from 0 to 1, default 0): steep at first, for the end of a long constant rate.

    Source: Hägele et al., Scaling laws and compute-optimal training beyond fixed training durations, 2024,
    arXiv:2405.18392.
    """

    def fallen(self, progress: float) -> float:
        return math.sqrt(progress)


@dataclass(frozen=True)
class one_cycle(Stretch):
    """Up from `start` to `peak` and down to `end`; with `three_phase`, down to `start` as fast as up, then on to `end`.

    torch's OneCycleLR with total_steps N and pct_start p is ``one_cycle(N - 1, rise=(p * N - 1) / (N - 1))`` of its
    max_lr; the momentum that it cycles against the rate is ``start=1, peak=base_momentum / max_momentum, end=1`` of its
    max_momentum. Source: Smith & Topin, Super-convergence, 2018, arXiv:1708.07120.

    Args:
        rise: the part of the way that goes up, from 0 to 1 (to 0.5 with three_phase), default 0.3.
        start, peak, end: factors, of at least 0 (default 1/25, 1 and 1/250,000).
        anneal: "cosine" (default) or "linear".
    """

    rise: float = 0.3
    start: float = 1 / 25
    peak: float = 1.0
    end: float = 1 / 25e4
    anneal: str = "cosine"
    three_phase: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        number(self, "rise", self.rise, to=0.5 if self.three_phase else 1)
        one_of(self, "anneal", self.anneal, ("cosine", "linear"))

    def shape(self, progress: float) -> float:
        phases = [(self.start, self.peak, self.rise), (self.peak, self.end, 1.0)]
        if self.three_phase:
            phases[1:] = [(self.peak, self.start, 2 * self.rise), (self.start, self.end, 1.0)]
        begin = 0.0
        for left, right, finish in phases:
            if begin < finish and progress <= finish:
                part = (progress - begin) / (finish - begin)
                return mix(left, right, half_cosine(part) if self.anneal == "cosine" else part)
            begin = finish
        return self.end


# By the steps since the curve began -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class warmup(Limited):
    """Up to 1 in a straight line over `steps` steps; 0 steps are no warm-up.

    Args:
        start: the first factor, from 0 to 1. Default 1 / (steps + 1), so that the first update is not lost.
    """

    steps: int
    start: float | None = None

    limits: ClassVar = {**Limited.limits, "start": partial(number, to=1)}

    def at(self, step: int, start: int) -> float:
        if step - start >= self.steps:
            return 1.0
        first = 1 / (self.steps + 1) if self.start is None else self.start
        return mix(first, 1.0, (step - start) / self.steps)

    def ends(self, start: int) -> int:
        return start + self.steps


@dataclass(frozen=True)
class cosine_restarts(Limited):
    """`cosine` again and again, each cycle `mult` times as long as the one before: SGDR, arXiv:1608.03983.

    torch's CosineAnnealingWarmRestarts, which has no end. With `cycles`, the curve ends at the floor of the last one.

    Args:
        period: length of the first cycle in steps, at least 1.
        mult: a number greater than 0 (default 1). One that is not whole makes cycles that end between two steps, and
            one below 1 shorter and shorter ones, so that `cycles` must say when to stop.
        floor: the factor that each cycle falls to, from 0 to 1 (default 0).
        cycles: how many there are, at least 1; None (default) for no end.
    """

    period: int
    mult: float = 1
    floor: float = 0.0
    cycles: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mult < 1 and self.cycles is None:
            raise ValueError(f"cosine_restarts: mult={self.mult!r} is less than 1, so cycles must be given")

    def at(self, step: int, start: int) -> float:
        end = self.ends(start)
        if end is not None and step >= end:
            return self.floor
        elapsed: float = step - start
        period: float = self.period
        if self.mult == 1:
            elapsed %= period
        while elapsed >= period:
            elapsed -= period
            period *= self.mult
        return mix(1.0, self.floor, half_cosine(elapsed / period))

    def ends(self, start: int) -> int | None:
        if self.cycles is None:
            return None
        return start + math.ceil(self.period * sum(self.mult**cycle for cycle in range(self.cycles)))


@dataclass(frozen=True)
class Open(Limited):
    """A curve without an end, unless it is given one: `until` completed steps."""

    until: int | None = field(default=None, kw_only=True)

    def ends(self, start: int) -> int | None:
        return None if self.until is None else not_before(start, self, self.until)

    def held(self, step: int) -> int:
        """The step, or the end if that is passed."""
        return step if self.until is None else min(step, self.until)


@dataclass(frozen=True)
class Elapsed(Open):
    """A curve that is given by the steps since it began."""

    def at(self, step: int, start: int) -> float:
        return self.after(self.held(step) - start)

    @abstractmethod
    def after(self, elapsed: int) -> float:
        """The factor `elapsed` steps after the beginning."""


@dataclass(frozen=True)
class constant(Elapsed):
    """Always `factor`, at least 0 (default 1)."""

    factor: float = 1.0

    def after(self, elapsed: int) -> float:
        return self.factor


@dataclass(frozen=True)
class exponential(Elapsed):
    """gamma^t, with gamma greater than 0: torch's ExponentialLR."""

    gamma: float

    def after(self, elapsed: int) -> float:
        return float(self.gamma**elapsed)


@dataclass(frozen=True)
class step_decay(Elapsed):
    """Times `gamma`, greater than 0 (default 0.1), every `every` steps: torch's StepLR."""

    every: int
    gamma: float = 0.1

    def after(self, elapsed: int) -> float:
        return float(self.gamma ** (elapsed // self.every))


@dataclass(frozen=True)
class inverse_sqrt(Elapsed):
    """1 / √(1 + t/timescale), with a timescale of at least 1 step.

    After a warm-up of w steps, a timescale of w gives √(w / step), the decay of Vaswani et al., Attention is all you
    need, 2017, arXiv:1706.03762, section 5.3.
    """

    timescale: int

    def after(self, elapsed: int) -> float:
        return math.sqrt(self.timescale / (self.timescale + elapsed))


# By the step number ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class piecewise(Open):
    """factors[0] before boundaries[0] completed steps, factors[1] from there to boundaries[1], and so on.

    torch's MultiStepLR with two milestones a and b is ``piecewise((a, b), (1, gamma, gamma**2))``.

    Args:
        boundaries: step numbers in rising order.
        factors: one more of them, each at least 0.
        until: where the curve ends, for another to follow; None (default) for no end.
    """

    boundaries: tuple[int, ...]
    factors: tuple[float, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "boundaries", tuple(self.boundaries))
        object.__setattr__(self, "factors", tuple(self.factors))
        for boundary in self.boundaries:
            whole(self, "boundaries", boundary)
        for factor in self.factors:
            number(self, "factors", factor)
        if list(self.boundaries) != sorted(set(self.boundaries)):
            raise ValueError(f"piecewise: boundaries must rise, got {self.boundaries}")
        if len(self.factors) != len(self.boundaries) + 1:
            raise ValueError(
                f"piecewise: factors must be one more than the {len(self.boundaries)} boundaries, got {self.factors}"
            )

    def at(self, step: int, start: int) -> float:
        return self.factors[bisect.bisect_right(self.boundaries, self.held(step))]


# Made of the others ---------------------------------------------------------------------------------------------------

TAILS: dict[str, Callable[[int, float], Curve]] = {
    "linear": lambda until, floor: linear(until, 1.0, floor),
    "cosine": cosine,
    "1-sqrt": one_minus_sqrt,
}


def warmup_stable_decay(
    until: int, warmup_steps: int, decay_steps: int, tail: str = "linear", floor: float = 0.0
) -> Curve:
    """Up over `warmup_steps`, constant, and down to `floor` over the last `decay_steps` before `until`.

    Args:
        until: the number of completed steps at which the decay is at its end, at least warmup_steps + decay_steps.
        warmup_steps, decay_steps: lengths, at least 0.
        tail: "linear" (default), "cosine" or "1-sqrt": `linear`, `cosine` or `one_minus_sqrt`.
        floor: the factor at the end, from 0 to 1 (default 0).

    Source: Hu et al., MiniCPM, 2024, arXiv:2404.06395; Hägele et al., arXiv:2405.18392, compare the tails.
    """
    owner = warmup_stable_decay
    for name, value in (("until", until), ("warmup_steps", warmup_steps), ("decay_steps", decay_steps)):
        whole(owner, name, value)
    one_of(owner, "tail", tail, TAILS)
    number(owner, "floor", floor, to=1)
    if until < warmup_steps + decay_steps:
        raise ValueError(
            f"warmup_stable_decay: until={until} is less than warmup_steps={warmup_steps} and decay_steps={decay_steps}"
            " together"
        )
    return warmup(warmup_steps).then(constant(until=until - decay_steps)).then(TAILS[tail](until, floor))


# What they share ------------------------------------------------------------------------------------------------------


def mix(left: float, right: float, part: float) -> float:
    """left at 0, right at 1, exactly."""
    return left * (1 - part) + right * part


def half_cosine(part: float) -> float:
    """From 0 at 0 to 1 at 1."""
    return (1 - math.cos(math.pi * part)) / 2


def not_before(start: int, curve: Curve, until: int) -> int:
    """The end `until`, unless the curve begins later."""
    if until < start:
        raise ValueError(f"{curve!r}: until={until} lies before {start}, where this curve begins")
    return until
