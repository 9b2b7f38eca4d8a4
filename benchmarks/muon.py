"""Muon's step over a GPT-2: torch.optim.Muon, with torch's fused AdamW for what is no matrix, against trainopt.Muon.

    python -m benchmarks.muon
    python -m benchmarks.muon --rounds 3 --layers 2

The hidden matrices are Muon's; embeddings, norms and biases AdamW's. The step over the matrices alone is timed too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch.nn import Parameter

import trainopt
from benchmarks.optimizers import parsed
from benchmarks.tables import duration, spread, text_table
from benchmarks.timing import interleave, machine, paired_ratio
from benchmarks.workloads import gpt2

LR = 1e-3


def parameters(layers: int, width: int) -> tuple[list[Parameter], list[Parameter]]:
    """The hidden matrices and all others, with gradients."""
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.zeros(shape)) for shape in gpt2(layers, width)]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)
    hidden = [param for param in params[2:] if param.ndim == 2]  # the first two are embeddings
    return hidden, [param for param in params if all(param is not other for other in hidden)]


def contenders(layers: int, width: int) -> dict[str, dict[str, Callable[[], object]]]:
    """By what is stepped: torch's step and trainopt's, each with parameters of its own."""
    hidden, rest = parameters(layers, width)
    muon, adamw = torch.optim.Muon(hidden, lr=LR), torch.optim.AdamW(rest, lr=LR, fused=True)

    def both() -> None:
        muon.step()
        adamw.step()

    hidden, rest = parameters(layers, width)
    groups: list[dict[str, Any]] = [{"params": hidden}, {"params": rest, "use_muon": False}]
    return {
        "matrices": {"torch": muon.step, "trainopt": trainopt.Muon(hidden, lr=LR).step},
        "all parameters": {"torch": both, "trainopt": trainopt.Muon(groups, lr=LR).step},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.muon", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="each times every contender (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument(
        "--only", choices=("matrices", "all parameters"), help="what is stepped (default: one, then all)"
    )
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--threads", type=int, help="threads torch may use (default: torch's own choice)")
    options = parsed(parser, arguments)
    print(f"{machine()}, trainopt {trainopt.__version__}\n", flush=True)
    rows = []
    for stepped, calls in contenders(options.layers, options.width).items():
        if options.only not in (None, stepped):
            continue
        seconds = interleave(calls, options.rounds)
        ratio = spread(paired_ratio(seconds["torch"], seconds["trainopt"]))
        rows.append([stepped, duration(median(seconds["torch"])), duration(median(seconds["trainopt"])), ratio])
    print(text_table([f"GPT-2 of {options.layers} layers", "torch", "trainopt", "times as fast"], rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
