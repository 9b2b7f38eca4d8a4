"""Time the training loop against the loop of ten lines that a person writes, on the 784-128-10 network.

    python -m benchmarks.training

Both train over the same tensors in batches of 64, with torch's Adam and cross-entropy and with trainopt's. What is
timed is a whole run of a few epochs, its beginning included, and what is given is the time of one step. The loop looks
every step whether the gradient is finite, and keeps its loss and what was gone through; the ten lines sum their loss
and do no more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trainopt
from benchmarks.tables import duration, markdown_table, spread, text_table
from benchmarks.timing import interleave, machine, paired_ratio
from trainopt._extension import _C
from trainopt.training import Silent, fit

SAMPLES, BATCH, EPOCHS = 4000, 64, 10
STEPS = EPOCHS * -(-SAMPLES // BATCH)

Loss = Callable[[Tensor, Tensor], Tensor]


def network() -> nn.Module:
    """784-128-10 with ReLU, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))


def ten_lines(images: Tensor, labels: Tensor, kind: type[torch.optim.Optimizer], cross_entropy: Loss) -> float:
    """What a person writes."""
    model = network()
    optimizer = kind(model.parameters())
    for _ in range(EPOCHS):
        total = 0.0
        for batch in torch.randperm(SAMPLES).split(BATCH):
            optimizer.zero_grad()
            loss = cross_entropy(model(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
    return total / SAMPLES


def the_loop(images: Tensor, labels: Tensor, kind: type[torch.optim.Optimizer], cross_entropy: Loss) -> float:
    """The same by `fit`."""
    model = network()
    optimizer = kind(model.parameters())
    return fit(model, (images, labels), cross_entropy, optimizer, epochs=EPOCHS, batch_size=BATCH, report=Silent()).loss


def contenders() -> dict[str, Callable[[], float]]:
    """Both loops, with torch's optimizer and loss and with trainopt's, by name."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(SAMPLES, 784, generator=generator)
    labels = torch.randint(0, 10, (SAMPLES,), generator=generator)
    torchs = (torch.optim.Adam, F.cross_entropy)
    ours = (trainopt.Adam, trainopt.functional.cross_entropy)
    return {
        "ten lines, torch": lambda: ten_lines(images, labels, *torchs),
        "fit, torch": lambda: the_loop(images, labels, *torchs),
        "ten lines, trainopt": lambda: ten_lines(images, labels, *ours),
        "fit, trainopt": lambda: the_loop(images, labels, *ours),
    }


def table(seconds: dict[str, list[float]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: the time of a step, against the ten lines with the same optimizer and with torch's."""
    rows = []
    for name, values in seconds.items():
        same = seconds[f"ten lines, {name.split(', ')[1]}"]
        ratios = (paired_ratio(values, same), paired_ratio(seconds["ten lines, torch"], values))
        rows.append([name, duration(median(values) / STEPS), *map(spread, ratios)])
    return ["Adam, batch 64", "a step", "of the ten lines' time", "times as fast as all torch"], rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="rounds; each times every contender once (default: 15)")
    parser.add_argument("--threads", type=int, help="threads torch may use (default: torch's own choice)")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    print(f"{machine()}, trainopt {trainopt.__version__} ({_C.cpu_variant()})", file=sys.stderr)
    seconds = interleave(contenders(), options.rounds)
    print((markdown_table if options.markdown else text_table)(*table(seconds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
