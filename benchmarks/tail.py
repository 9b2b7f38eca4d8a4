"""What follows a backward pass: clipping by the global norm, AdamW, a moving average, clearing the gradients.

    python -m benchmarks.tail
    python -m benchmarks.tail --workload gpt2 --rounds 9

torch has a pass for each: clip_grad_norm_(foreach=True), AdamW(fused=True), get_ema_multi_avg_fn, zero_grad. trainopt
has two: one that reads the gradients for their norm, and the step. Before each call, outside of the time, the gradients
are what a backward pass would have left there, with a norm above the limit.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter

import torch
from torch.nn import Parameter
from torch.optim.swa_utils import get_ema_multi_avg_fn

import trainopt
from benchmarks.bandwidth import ReadModifyWrite
from benchmarks.optimizers import parsed, parser_of
from benchmarks.tables import duration, percent, spread, text_table
from benchmarks.timing import BLOCK_SECONDS, machine, paired_ratio
from benchmarks.workloads import WORKLOADS, Workload
from trainopt._extension import _C

LIMIT, DECAY, LR = 1.0, 0.999, 1e-3

#: Values of each element that are read or written: the gradient for the norm; parameter, gradient, two moments and
#: average, both ways.
MOVED = 1 + 2 * 5


class Contender:
    """One way through the tail, with parameters, gradients and states of its own."""

    def __init__(self, workload: Workload) -> None:
        generator = torch.Generator().manual_seed(0)
        self.backward = [torch.randn(shape, generator=generator).to(workload.dtype) for shape in workload.shapes]
        self.params = [Parameter(torch.zeros_like(gradient)) for gradient in self.backward]
        self.gradients = [torch.empty_like(gradient) for gradient in self.backward]

    def fill(self) -> None:
        """The gradients, as after a backward pass."""
        torch._foreach_copy_(self.gradients, self.backward)
        for param, gradient in zip(self.params, self.gradients, strict=True):
            param.grad = gradient


def by_torch(workload: Workload, set_to_none: bool) -> tuple[Contender, Callable[[], object]]:
    """The passes of torch."""
    own = Contender(workload)
    optimizer = torch.optim.AdamW(own.params, lr=LR, fused=True)
    averages = [param.detach().clone() for param in own.params]
    update = get_ema_multi_avg_fn(DECAY)

    def tail() -> None:
        torch.nn.utils.clip_grad_norm_(own.params, LIMIT, foreach=True)
        optimizer.step()
        update(averages, own.params, 1)  # type: ignore[arg-type]
        optimizer.zero_grad(set_to_none=set_to_none)

    return own, tail


def by_trainopt(workload: Workload) -> tuple[Contender, Callable[[], object]]:
    """The step alone."""
    own = Contender(workload)
    optimizer = trainopt.AdamW(own.params, lr=LR, max_grad_norm=LIMIT, ema_decay=DECAY, zero_grad="in_step")
    return own, optimizer.step


def measure(workload: Workload, rounds: int) -> dict[str, list[float]]:
    """Seconds a call of every contender in every round, in an order drawn anew."""
    contenders = {
        "torch, zero_grad(set_to_none=False)": by_torch(workload, set_to_none=False),
        "torch, zero_grad(set_to_none=True)": by_torch(workload, set_to_none=True),
        "trainopt": by_trainopt(workload),
    }
    memory = ReadModifyWrite(MOVED * workload.elements * workload.dtype.itemsize)

    def once(own: Contender | None, tail: Callable[[], object]) -> float:
        if own is not None:
            own.fill()
        start = perf_counter()
        tail()
        return perf_counter() - start

    calls = {name: (own, tail) for name, (own, tail) in contenders.items()} | {memory.label: (None, memory)}
    for call in calls.values():
        once(*call)
    check(*(own.params for own, _ in contenders.values()))
    repeats = {name: max(2, round(BLOCK_SECONDS / once(*call))) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            once(*calls[name])  # its own data in the caches
            seconds[name].append(median(once(*calls[name]) for _ in range(repeats[name])))
    return seconds


def check(*params: list[Parameter]) -> None:
    """That all have made the same step."""
    for other in params[1:]:
        for one, two in zip(params[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=0.02, atol=1e-5)


def table(workload: Workload, seconds: dict[str, list[float]]) -> str:
    """A row a contender."""
    torchs = [name for name in seconds if name.startswith("torch")]
    memory = seconds[ReadModifyWrite.label]
    rows = []
    for name, times in seconds.items():
        ratios = [spread(paired_ratio(seconds[reference], times)) for reference in torchs]
        rows.append([name, duration(median(times)), *ratios, percent(paired_ratio(memory, times).median)])
    head = ["contender", "a tail", *(f"times as fast as {name}" for name in torchs), "of memory speed"]
    return f"{workload.outline}, {4 * MOVED} bytes an element\n{text_table(head, rows)}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the options choose and print it."""
    options = parsed(parser_of("benchmarks.tail", __doc__, ["gpt2", "resnet50", "1000x64"], rounds=15), arguments)
    print(f"{machine()}, trainopt {trainopt.__version__} ({_C.cpu_variant()})\n", flush=True)
    for name in options.workload:
        workload = WORKLOADS[name]
        print(table(workload, measure(workload, options.rounds)), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
