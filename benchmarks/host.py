"""What an optimizer step on a GPU costs the host, by the number of parameters.

    python -m benchmarks.host                                       on a GPU, beside torch's fused and foreach steps
    PYTHONPATH=build/emulated python -P -m benchmarks.host          without one, after `make emulated`

Small models are bound by the host: it must have handed a step over before the kernel, of some 20 µs, has ended. Each
parameter has 64 elements. On a GPU the device is waited for after each block of calls, outside the time. On the tests'
emulated device launches only count, so what is timed is all of trainopt's own work, and none of CUDA's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

import trainopt
from benchmarks.gpu import interleave
from benchmarks.optimizers import positive
from benchmarks.tables import duration, markdown_table, spread, text_table
from benchmarks.timing import Spread, machine, paired_ratio
from trainopt._extension import _C

COUNTS = (1, 148, 1000, 2000)  # 148: as many as GPT-2 small has
ELEMENTS = 64
OURS = "trainopt"
CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("SGD", {"lr": 1e-3}),
    "SGD, momentum": ("SGD", {"lr": 1e-3, "momentum": 0.9}),
    "AdamW": ("AdamW", {"lr": 1e-3}),
    "AdamW, capturable": ("AdamW", {"lr": 1e-3, "capturable": True}),
}


def stepper(optimizer_class: type, options: dict[str, Any], count: int, device: torch.device) -> Callable[[], object]:
    """The step of an optimizer that has made its first ones."""
    params = [torch.zeros(ELEMENTS, device=device, requires_grad=True) for _ in range(count)]
    for param in params:
        param.grad = torch.full_like(param, 1e-3)
    optimizer = optimizer_class(params, **options)
    for _ in range(3):
        optimizer.step()
    return optimizer.step


def rows(counts: Sequence[int], rounds: int, device: torch.device) -> list[list[str]]:
    """A row for each class, number of parameters and contender."""
    found = []
    for title, (name, options) in CLASSES.items():
        for count in counts:
            calls = {OURS: stepper(getattr(trainopt, name), options, count, device)}
            for variant in ("fused", "foreach") if device.type == "cuda" else ():
                torchs = getattr(torch.optim, name)
                calls[f"torch, {variant}"] = stepper(torchs, {**options, variant: True}, count, device)
            if device.type == "simt":
                _C.simt.skip_launches(True)
            try:
                _, host = interleave(calls, rounds, device, 0.02)
            finally:
                if device.type == "simt":
                    _C.simt.skip_launches(False)
            for contender, seconds in host.items():
                each = Spread.of([value / count * 1e9 for value in seconds])
                ratio = spread(paired_ratio(seconds, host[OURS]))
                found.append([title, str(count), contender, duration(Spread.of(seconds).median), spread(each), ratio])
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; 2 where there is neither a GPU nor the emulated device."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.host", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=positive, default=15, help="default: %(default)s")
    parser.add_argument("--counts", type=positive, nargs="+", default=list(COUNTS), help="numbers of parameters")
    parser.add_argument("--markdown", action="store_true", help="tables in Markdown")
    options = parser.parse_args(arguments)
    kinds = [kind for kind in ("cuda", "simt") if kind in _C.device_types()]
    if not kinds or (kinds == ["cuda"] and not torch.cuda.is_available()):
        print("there is no GPU that trainopt is built for, and this is not the emulated package", file=sys.stderr)
        return 2
    device = torch.device(kinds[0], 0)
    print(f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'the emulated device'}; {machine()}")
    head = ["optimizer", "parameters", "contender", "a step", "ns a parameter", f"times {OURS}'s"]
    table = markdown_table if options.markdown else text_table
    print(table(head, rows(options.counts, options.rounds, device)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
