"""What clip_grad_norm_ costs, with trainopt and with torch: where it clips, and where the norm is below the limit.

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

CLIPS = {"torch": torch.nn.utils.clip_grad_norm_, "trainopt": trainopt.clip_grad_norm_}


def with_gradients(workload: Workload) -> list[Parameter]:
    """Parameters of these shapes, of no other use than to hold a gradient."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in workload.shapes:
        param = Parameter(torch.empty(shape, dtype=workload.dtype))
        param.grad = torch.randn(shape, generator=generator).to(workload.dtype)
        params.append(param)
    return params


def measure(workload: Workload, clips: bool, rounds: int) -> list[str]:
    """A row: the case, each contender's time, and how many times as fast trainopt is."""
    params = with_gradients(workload)
    norm = trainopt.get_total_norm([p.grad for p in params if p.grad is not None]).item()
    # A negative limit keeps the norm while it changes every sign: every call writes, and no gradient fades away.
    limit = -norm if clips else 2 * norm
    contenders = {name: (lambda clip=clip: clip(params, limit)) for name, clip in CLIPS.items()}
    seconds = interleave(contenders, rounds)
    ratio = paired_ratio(seconds["torch"], seconds["trainopt"])
    times = [duration(Spread.of(seconds[name]).median) for name in CLIPS]
    return [f"{workload.name}, {'clips' if clips else 'below the limit'}", *times, spread(ratio)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=list(WORKLOADS), default=["1000x64", "gpt2", "64m"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    options = parser.parse_args(arguments)
    rows = [measure(WORKLOADS[name], clips, options.rounds) for name in options.workload for clips in (True, False)]
    print(machine())
    table = markdown_table if options.markdown else text_table
    print(table(["clip_grad_norm_", *CLIPS, "torch / trainopt"], rows))


if __name__ == "__main__":
    main()
