"""What clipping costs, with trainopt and with torch.

clip_grad_norm_ where it clips, and where the norm is below the limit; clip_grad_value_ where no element is beyond it.

python -m benchmarks.clip
python -m benchmarks.clip --workload 64m --markdown
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch.nn import Parameter

import trainopt
from benchmarks.tables import duration, markdown_table, spread, text_table
from benchmarks.timing import Spread, interleave, machine, paired_ratio
from benchmarks.workloads import WORKLOADS, Workload

LIBRARIES = {"torch": torch.nn.utils, "trainopt": trainopt}
#: Each case: the function, and its limit from the gradients' norm. A negative limit keeps the norm while it changes
#: every sign: every call writes, and no gradient fades away.
CASES = {
    "clips": ("clip_grad_norm_", lambda norm: -norm),
    "below the limit": ("clip_grad_norm_", lambda norm: 2 * norm),
    "by value, below the limit": ("clip_grad_value_", lambda norm: 100.0),
}


def with_gradients(workload: Workload) -> list[Parameter]:
    """Parameters of these shapes, of no other use than to hold a gradient."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in workload.shapes:
        param = Parameter(torch.empty(shape, dtype=workload.dtype))
        param.grad = torch.randn(shape, generator=generator).to(workload.dtype)
        params.append(param)
    return params


def measure(workload: Workload, case: str, rounds: int) -> list[str]:
    """A row: the case, each contender's time, and how many times as fast trainopt is."""
    params = with_gradients(workload)
    norm = trainopt.get_total_norm([p.grad for p in params if p.grad is not None]).item()
    function, limit_of = CASES[case]
    limit = limit_of(norm)
    clips = {name: getattr(library, function) for name, library in LIBRARIES.items()}
    contenders = {name: (lambda clip=clip: clip(params, limit)) for name, clip in clips.items()}
    seconds = interleave(contenders, rounds)
    ratio = paired_ratio(seconds["torch"], seconds["trainopt"])
    times = [duration(Spread.of(seconds[name]).median) for name in LIBRARIES]
    return [f"{workload.name}, {case}", *times, spread(ratio)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=list(WORKLOADS), default=["1000x64", "gpt2", "64m"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    options = parser.parse_args(arguments)
    rows = [measure(WORKLOADS[name], case, options.rounds) for name in options.workload for case in CASES]
    print(machine())
    table = markdown_table if options.markdown else text_table
    print(table(["clipping", *LIBRARIES, "torch / trainopt"], rows))


if __name__ == "__main__":
    main()
