"""Time contenders against each other in one process, with torch.utils.benchmark.

Machines that others share change speed by the minute. So every round measures all contenders, in random order, and what
is compared is the ratio within a round: its median and quartiles over the rounds say how far a figure can be trusted.
"""

from __future__ import annotations

import platform
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from timeit import timeit

import torch
from torch.utils.benchmark import Timer

BLOCK_SECONDS = 0.02
LONG_SECONDS = 0.1


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a figure over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of the values."""
        low, median, high = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double())
        return cls(median.item(), low.item(), high.item())


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """The spread of the ratio within each round."""
    return Spread.of([a / b for a, b in zip(numerator, denominator, strict=True)])


def paired_difference(minuend: Sequence[float], subtrahend: Sequence[float]) -> Spread:
    """The spread of the difference within each round."""
    return Spread.of([a - b for a, b in zip(minuend, subtrahend, strict=True)])


def interleave(
    contenders: Mapping[str, Callable[[], object]], rounds: int, block_seconds: float = BLOCK_SECONDS, seed: int = 0
) -> dict[str, list[float]]:
    """Seconds per call of every contender in every round.

    A round times one block of calls of each contender, in an order drawn anew; a block is as many calls as fill
    `block_seconds`, at least one. The timer makes two or more calls before each block, so that a contender finds its
    own data in the caches, as far as they fit, and not those of the contender before it. A call of LONG_SECONDS or
    more makes no others: filling the caches is next to nothing of it.
    """
    threads = torch.get_num_threads()
    timers = {name: Timer("call()", globals={"call": call}, num_threads=threads) for name, call in contenders.items()}
    single = {name: timer.timeit(1).median for name, timer in timers.items()}
    calls = {name: max(1, round(block_seconds / once)) for name, once in single.items()}

    def block(name: str) -> float:
        if single[name] >= LONG_SECONDS:
            return timeit(contenders[name], number=1)
        return timers[name].timeit(calls[name]).median

    order = list(timers)
    shuffle = random.Random(seed).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            seconds[name].append(block(name))
    return seconds


def machine() -> str:
    """The processor, the threads torch uses, and torch's version."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = models[0] if models else platform.processor() or platform.machine()
    return f"{processor}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
