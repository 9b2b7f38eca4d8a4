"""What a loss costs, forward and backward, with trainopt and its peers.

    python -m benchmarks.losses
    python -m benchmarks.losses --case cross-entropy linear --compile --markdown

Every contender computes the same loss of the same tensors, and its gradient, in one process and in turn. All of it is
measured twice, in two processes: with the C library's allocator as it is, which gives large memory back to the system
and gets it page by page again; and with GLIBC_TUNABLES telling it to keep its memory. The peak memory of
linear_cross_entropy is measured in a further process for each contender.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

import trainopt
from benchmarks.bandwidth import ReadModifyWrite
from benchmarks.loss_cases import CASES, OURS, Case, Step
from benchmarks.memory import can_measure, peak_in_new_process
from benchmarks.optimizers import new_file, positive
from benchmarks.tables import duration, markdown_table, percent, spread, text_table
from benchmarks.timing import Spread, interleave, machine, paired_ratio
from trainopt._extension import _C

COMPILED = "torch.compile"
LARGE = 2**36
ALLOCATORS = {
    "default allocator": "",
    "allocator that keeps its memory": f"glibc.malloc.mmap_threshold={LARGE}:glibc.malloc.trim_threshold={LARGE}",
}


@dataclass
class Result:
    """One case: seconds of forward and backward of each contender, round by round."""

    case: int
    allocator: str
    seconds: dict[str, list[float]] = field(default_factory=dict)
    memory_pass: list[float] = field(default_factory=list)
    peaks: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def speedup(self, contender: str) -> Spread:
        """How many times as fast as the case's reference."""
        return paired_ratio(self.seconds[CASES[self.case].reference], self.seconds[contender])


# --------------------------------------------------------------------------------------------------------- measuring


def operands_of(case: Case) -> tuple[Tensor, ...]:
    """The same ones for everybody."""
    torch.manual_seed(0)
    return case.make()


def step_of(case_index: int, name: str) -> Callable[[], object]:
    """A contender of a case with operands of its own, ready to run."""
    case = CASES[case_index]
    operands = operands_of(case)
    if name in case.losses:
        return Step(case.losses[name], operands)
    other = case.others[name]
    return lambda: other(*operands)


class Prepared:
    """step_of, to be sent to another process; it starts torch's threads there first."""

    def __init__(self, case_index: int, name: str, threads: int) -> None:
        self.case_index, self.name, self.threads = case_index, name, threads

    def __call__(self) -> Callable[[], object]:
        torch.set_num_threads(self.threads)
        step = step_of(self.case_index, self.name)
        torch.mm(torch.rand(300, 300), torch.rand(300, 300))
        return step


def measure(index: int, rounds: int, allocator: str, with_compile: bool, with_peaks: bool) -> Result:
    """Time all contenders that do the work; those that do not are left out, with the reason."""
    case, result = CASES[index], Result(index, allocator)
    losses = dict(case.losses)
    if with_compile and case.reference in losses and case.reference != OURS:
        torch._dynamo.reset()
        losses[COMPILED] = torch.compile(losses[case.reference])
    truth: list[Tensor] = []
    steps: dict[str, Callable[[], object]] = {}
    for name, loss in losses.items():
        step = Step(loss, operands_of(case))
        try:
            value = step().detach()
        except Exception as error:  # a peer that does not work here, for whatever reason, does not end the benchmark
            if name == OURS:
                raise
            result.left_out[name] = f"{type(error).__name__}: {error}"
            continue
        found = [value, *(leaf.grad for leaf in step.leaves if leaf.grad is not None)]
        truth = truth or [tensor.clone() for tensor in found]
        if all(map(is_alike, found, truth)):
            steps[name] = step
        else:
            result.left_out[name] = f"its loss or gradient is unlike that of {case.reference}"
    if OURS in result.left_out:
        raise RuntimeError(f"trainopt, {case.title}: {result.left_out[OURS]}")
    del truth
    for name, other in case.others.items():
        operands = operands_of(case)
        steps[name] = lambda other=other, operands=operands: other(*operands)
    if case.moved:
        steps[ReadModifyWrite.label] = ReadModifyWrite(case.moved)
    result.seconds = interleave(steps, rounds)
    result.memory_pass = result.seconds.pop(ReadModifyWrite.label, [])
    if with_peaks and case.name == "linear" and can_measure():
        for name in case.losses:
            result.peaks[name] = peak_in_new_process(Prepared(index, name, torch.get_num_threads()))
    return result


def is_alike(found: Tensor, truth: Tensor) -> bool:
    """Off by no more than rounding explains, in the norm."""
    error = (found.double() - truth.double()).norm()
    return bool(error <= 0.02 * truth.double().norm())


# --------------------------------------------------------------------------------------------------------- reporting


def row_of(result: Result, name: str) -> list[str]:
    """Contender, time, ratio, share of memory's speed, peak memory."""
    seconds = result.seconds[name]
    share = percent(1 / paired_ratio(seconds, result.memory_pass).median) if result.memory_pass else ""
    peak = f"{result.peaks[name] / 1e6:,.0f} MB" if name in result.peaks else ""
    return [name, duration(median(seconds)), spread(result.speedup(name)), share, peak]


def details(result: Result) -> str:
    """A table with a row a contender."""
    case = CASES[result.case]
    ratio = f"times as fast as {case.reference}"
    head = ["contender", "forward + backward", ratio, "of memory speed", "peak above the operands"]
    rows = [row_of(result, name) for name in result.seconds]
    lines = [
        f"{case.title}; {result.allocator}",
        text_table(head, rows),
        *(f"{name} is left out: {reason}" for name, reason in result.left_out.items()),
    ]
    return "\n".join(lines) + "\n"


def summary(results: Sequence[Result]) -> str:
    """A Markdown table for each allocator, with a row a case."""
    tables = []
    for allocator in ALLOCATORS:
        rows = []
        for result in (result for result in results if result.allocator == allocator):
            case = CASES[result.case]
            times = {name: duration(median(seconds)) for name, seconds in result.seconds.items()}
            compiled = times.get(COMPILED, "")
            peers = [f"{name}: {times[name]}" for name in times if name not in (case.reference, OURS, COMPILED)]
            memory = [f"{name}: {peak / 1e6:,.0f} MB" for name, peak in result.peaks.items()]
            row = [case.title, times[case.reference], compiled, times[OURS], spread(result.speedup(OURS))]
            rows.append([*row, "; ".join([*peers, *memory])])
        if rows:
            head = [allocator, "torch eager", COMPILED, OURS, "times as fast as torch eager", "beside them"]
            tables.append(markdown_table(head, rows))
    return "\n\n".join(tables)


# ------------------------------------------------------------------------------------------------------ command line


def measure_in_new_process(allocator: str, options: argparse.Namespace, file: Path) -> list[Result]:
    """Runs this module again, with the allocator's settings in the environment, which are read as a process starts."""
    command = [sys.executable, "-m", "benchmarks.losses", "--allocator", allocator, "--json", str(file)]
    command += ["--rounds", str(options.rounds), "--case", *options.case]
    command += ["--compile"] if options.compile else []
    command += ["--threads", str(options.threads)] if options.threads is not None else []
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    if ALLOCATORS[allocator]:
        environment["GLIBC_TUNABLES"] = ALLOCATORS[allocator]
    subprocess.run(command, env=environment, check=True, stdout=sys.stderr if options.markdown else sys.stdout)
    return [Result(**result) for result in json.loads(file.read_text())["results"]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the options choose and print it."""
    names = list(dict.fromkeys(case.name for case in CASES))
    parser = argparse.ArgumentParser(prog="python -m benchmarks.losses", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--case", nargs="+", choices=names, default=names, help="groups of cases (default: all)")
    add("--rounds", type=positive, default=5, help="rounds; each times every contender once (default: %(default)s)")
    add("--threads", type=positive, help="threads torch may use (default: torch's own choice)")
    add("--compile", action="store_true", help="time torch.compile too, which needs a compiler and takes a while")
    add("--allocator", choices=ALLOCATORS, help="measure in this process, and say that it has this allocator")
    add("--json", type=new_file, metavar="FILE", help="write every measurement to this file, in seconds")
    add("--markdown", action="store_true", help="print Markdown tables with a row a case (default: a row a contender)")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)

    heading = f"{machine()}, trainopt {trainopt.__version__} ({_C.cpu_variant()})"
    results: list[Result] = []
    if options.allocator is not None:
        for index, case in enumerate(CASES):
            if case.name in options.case:
                peaks = options.allocator == next(iter(ALLOCATORS))
                results.append(measure(index, options.rounds, options.allocator, options.compile, peaks))
                print(details(results[-1]), flush=True)
    else:
        print(f"{heading}\nMedians of {options.rounds} interleaved rounds; in brackets the quartiles\n", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            for allocator in ALLOCATORS:
                results += measure_in_new_process(allocator, options, Path(folder) / "results.json")
        if options.markdown:
            print(summary(results))
    if options.json is not None:
        found = {"machine": heading, "results": [asdict(result) for result in results]}
        options.json.write_text(json.dumps(found, indent=1) + os.linesep)
    return 0


if __name__ == "__main__":
    sys.exit(main())
