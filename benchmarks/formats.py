"""AdamW with parameters and states stored in fewer bytes, against torch's fused step in float32.

    python -m benchmarks.formats
    python -m benchmarks.formats --workload gpt2 --rounds 9

Gradients stay where they are. The bytes moved are those that a step has to read and write of an element; the state
bytes are those of the optimizer's own tensors, without the counts of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch.nn import Parameter

import trainopt
from benchmarks.bandwidth import ReadModifyWrite
from benchmarks.optimizers import parsed, parser_of
from benchmarks.tables import duration, percent, spread, text_table
from benchmarks.timing import interleave, machine, paired_ratio
from benchmarks.workloads import WORKLOADS, Workload
from trainopt._extension import _C

LR = 1e-3


@dataclass(frozen=True)
class Format:
    """One way to store what AdamW needs."""

    name: str
    dtype: torch.dtype  # of parameters and gradients
    bytes_moved: float  # for an element, in a step
    options: dict[str, Any]
    cls: Any = trainopt.AdamW


SCALES = 2 * 2 * 4 / 256  # of two moments, read and written

FORMATS = (
    Format("torch fused, float32", torch.float32, 28, {"fused": True}, torch.optim.AdamW),
    Format("torch fused, bfloat16", torch.bfloat16, 14, {"fused": True}, torch.optim.AdamW),
    Format("float32", torch.float32, 28, {}),
    Format("float32, stats", torch.float32, 28, {"stats": True}),
    Format("float32, cautious", torch.float32, 28 + 16, {"cautious": True}),
    Format("float32, 8-bit states", torch.float32, 16 + SCALES, {"state_dtype": "8bit"}),
    Format("bfloat16", torch.bfloat16, 14, {}),
    Format("bfloat16, master", torch.bfloat16, 18, {"precision": "master"}),
    Format("bfloat16, master, float32 states", torch.bfloat16, 26, {"precision": "master", "state_dtype": "float32"}),
    Format(
        "bfloat16, master24, 8-bit states",
        torch.bfloat16,
        12 + SCALES,
        {"precision": "master24", "state_dtype": "8bit"},
    ),
    Format("bfloat16, stochastic", torch.bfloat16, 14, {"precision": "stochastic"}),
    Format(
        "bfloat16, stochastic, 8-bit states",
        torch.bfloat16,
        10 + SCALES,
        {"precision": "stochastic", "state_dtype": "8bit"},
    ),
)


def optimizer_of(workload: Workload, stored: Format) -> Any:
    """An optimizer with gradients of its own, after a first step."""
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.zeros(shape, dtype=stored.dtype)) for shape in workload.shapes]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(stored.dtype)
    optimizer = stored.cls(params, lr=LR, **stored.options)
    optimizer.step()
    return optimizer


def state_bytes(optimizer: Any) -> float:
    """Bytes of state an element of the parameters, counts of steps apart."""
    elements = held = 0
    for group in optimizer.param_groups:
        for param in group["params"]:
            elements += param.numel()
            held += sum(v.nbytes for k, v in optimizer.state[param].items() if k != "step")
    return held / elements


def measure(workload: Workload, rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds a step of every format in every round; and the bytes of its states."""
    optimizers = {stored.name: optimizer_of(workload, stored) for stored in FORMATS}
    calls: dict[str, Callable[[], object]] = {name: optimizer.step for name, optimizer in optimizers.items()}
    calls[ReadModifyWrite.label] = ReadModifyWrite(28 * workload.elements)
    return interleave(calls, rounds), {name: state_bytes(optimizer) for name, optimizer in optimizers.items()}


def table(workload: Workload, seconds: dict[str, list[float]], states: dict[str, float]) -> str:
    """A row a format."""
    rows = []
    for stored in FORMATS:
        times, base = seconds[stored.name], seconds[FORMATS[0].name]
        at_memory_speed = [whole * stored.bytes_moved / 28 for whole in seconds[ReadModifyWrite.label]]
        rows.append(
            [
                stored.name,
                f"{stored.bytes_moved:.4g}",
                f"{states[stored.name]:.3f}",
                duration(median(times)),
                spread(paired_ratio(base, times)),
                percent(paired_ratio(at_memory_speed, times).median),
            ]
        )
    head = [
        "stored as",
        "bytes moved",
        "state bytes",
        "a step",
        f"times as fast as {FORMATS[0].name}",
        "of memory speed",
    ]
    return f"{workload.outline}\n{text_table(head, rows)}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the options choose and print it."""
    options = parsed(parser_of("benchmarks.formats", __doc__, ["gpt2", "resnet50"], rounds=9), arguments)
    print(f"{machine()}, trainopt {trainopt.__version__} ({_C.cpu_variant()})\n", flush=True)
    for name in options.workload:
        workload = WORKLOADS[name]
        print(table(workload, *measure(workload, options.rounds)), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
