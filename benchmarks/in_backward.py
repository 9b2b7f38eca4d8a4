"""Steps within the backward pass (`trainopt.step_in_backward`) against steps after it: time, and peak of memory.

    python -m benchmarks.in_backward

A transformer of GPT-2's shapes (124M parameters), a batch of one sequence. What is timed is backward and step, of
trainopt.AdamW; the peak is what both add to the memory that was held before, in a process of their own.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

import trainopt
from benchmarks.memory import can_measure, peak_in_new_process
from benchmarks.optimizers import positive
from benchmarks.tables import duration, spread, text_table
from benchmarks.timing import machine, paired_ratio
from trainopt._extension import _C
from trainopt.experiments.transformer import Transformer
from trainopt.functional import linear_cross_entropy

VOCABULARY, CONTEXT, WIDTH, LAYERS, HEADS = 50257, 1024, 768, 12, 12
CONTENDERS = ("apart", "in backward")


class Training:
    """A model with its optimizer; `forward`, then `backward_and_step`."""

    def __init__(self, contender: str, tokens: int) -> None:
        torch.manual_seed(0)
        self.model = Transformer(VOCABULARY, CONTEXT, width=WIDTH, layers=LAYERS, heads=HEADS)
        self.optimizer = trainopt.AdamW(self.model.parameters(), lr=1e-4)
        self.optimizer.init_state()
        if contender == "in backward":
            trainopt.step_in_backward(self.model, self.optimizer)
        self.codes = torch.randint(VOCABULARY, (1, tokens + 1))

    def forward(self) -> Tensor:
        """The loss."""
        hidden, weight = self.model(self.codes[:, :-1])
        return linear_cross_entropy(hidden[0], weight, self.codes[0, 1:])

    def backward_and_step(self, loss: Tensor) -> None:
        """What is measured."""
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def measure(tokens: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of backward and step, by contender, round by round in an order drawn anew."""
    trainings = {name: Training(name, tokens) for name in CONTENDERS}
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    order, shuffle = list(CONTENDERS), random.Random(0).shuffle
    for round_ in range(rounds + 1):
        shuffle(order)
        for name in order:
            loss = trainings[name].forward()
            start = perf_counter()
            trainings[name].backward_and_step(loss)
            if round_:  # the first is a warm-up
                seconds[name].append(perf_counter() - start)
    return seconds


def prepare(contender: str, tokens: int) -> Callable[[], object]:
    """A backward pass and step that is still to be made, after one that has been."""
    training = Training(contender, tokens)
    training.backward_and_step(training.forward())
    return partial(training.backward_and_step, training.forward())


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.in_backward", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--tokens", type=positive, default=128, help="of the sequence (default: %(default)s)")
    parser.add_argument("--rounds", type=positive, default=9, help="each times both (default: %(default)s)")
    options = parser.parse_args(arguments)
    print(f"{machine()}, trainopt {trainopt.__version__} ({_C.cpu_variant()})\n", flush=True)
    seconds = measure(options.tokens, options.rounds)
    rows = []
    for name, times in seconds.items():
        peak = peak_in_new_process(partial(prepare, name, options.tokens)) if can_measure() else 0
        ratio = spread(paired_ratio(seconds["apart"], times))
        rows.append([name, duration(median(times)), ratio, f"{peak / 1e6:,.0f} MB"])
    print(text_table(["the step", "backward and step", "times as fast", "peak of memory"], rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
